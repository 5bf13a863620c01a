// Runs the directions of a layer: chooses the threads and the partition, and has the scratch memory.
#pragma once

#include "../layer.h"

namespace rnnfast {

int max_threads();

// `layers` are the one or two directions of one layer, of the same sizes; they may run side by side,
// each with half of the threads. Throw std::bad_alloc before anything is written. `threads` is what the
// call may use at most.
template <class T>
void run_forward(int cell, const Layer<T>* layers, int directions, int threads);
// The gradient of x is the sum over the directions.
template <class T>
void run_backward(int cell, const Layer<T>* layers, const Gradients<T>* grads, int directions,
                  int threads);

// Operations per second of `threads` threads that run a NumberKernels::peak, measured for about
// `seconds`.
double peak_flops(double (*run)(long rounds), int threads, double seconds);

}  // namespace rnnfast
