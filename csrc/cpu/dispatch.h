// Picks the instruction set and the threads, and runs a layer.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace rnnfast {

std::vector<std::string> built_isas();
std::vector<std::string> supported_isas();  // of those built, what this machine can run, best last

// The table in use: the best supported one, or the one that the environment variable RNNFAST_ISA names.
// Throws std::runtime_error where that was not built or this machine lacks it.
const Kernels& kernels();

int max_threads();

// Throw std::bad_alloc before anything is written. `threads` is what the call may use at most.
template <class T>
void run_forward(int cell, const Layer<T>& layer, int threads);
template <class T>
void run_backward(int cell, const Layer<T>& layer, const Gradients<T>& grads, int threads);

// Operations per second of `threads` threads together, measured for about `seconds`.
double peak_flops(bool float64, int threads, double seconds);

}  // namespace rnnfast
