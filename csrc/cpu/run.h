// Runs the layers of a stack: chooses the threads and the partition, and has the scratch memory.
#pragma once

#include "core/layer.h"
#include "core/team.h"
#include "cpu/plan.h"

namespace rnnfast {

// `layers` are the one or two directions of one layer, of the same sizes; they may run side by side,
// each with half of the threads. Throw std::bad_alloc before anything is written. `threads` is what the
// call may use at most.
template <class T>
void run_forward(int cell, const Layer<T>* layers, int directions, int threads);
// The gradient of x is the sum over the directions.
template <class T>
void run_backward(int cell, const Layer<T>* layers, const Gradients<T>* grads, int directions,
                  int threads);

// A wavefront over layers of one direction: `columns` of them at a time, each by a team of its own that
// is some steps behind the team of the layer that it reads. None where columns is 1.
struct Wavefront {
  int columns = 1;
  int team = 1;  // threads of each
  Split split = Split::rows;
  double seconds = 0;

  explicit operator bool() const { return columns > 1; }
};

// Whether that is faster than one layer after the other. Of the layers only the sizes matter. One that
// is chosen may be run, with the same layers, in the order of processing: those of backward from the
// last layer to the first. Each layer then needs an x and a y, or gradients of them, of its own.
template <class T>
Wavefront wavefront(int cell, const Layer<T>* layers, int count, bool backward, int threads);
template <class T>
void run_forward(int cell, const Wavefront& plan, const Layer<T>* layers, int count);
template <class T>
void run_backward(int cell, const Wavefront& plan, const Layer<T>* layers, const Gradients<T>* grads,
                  int count);

// Operations per second of `threads` threads that run a NumberKernels::peak, measured for about
// `seconds`.
double peak_flops(double (*run)(long rounds), int threads, double seconds);

}  // namespace rnnfast
