// Runs a layer: chooses the threads and the partition, and has the scratch memory.
#pragma once

#include "../layer.h"

namespace rnnfast {

int max_threads();

// Throw std::bad_alloc before anything is written. `threads` is what the call may use at most.
template <class T>
void run_forward(int cell, const Layer<T>& layer, int threads);
template <class T>
void run_backward(int cell, const Layer<T>& layer, const Gradients<T>& grads, int threads);

// Operations per second of `threads` threads together, measured for about `seconds`.
double peak_flops(bool float64, int threads, double seconds);

}  // namespace rnnfast
