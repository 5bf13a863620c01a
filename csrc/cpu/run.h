// Runs the layers of a stack: chooses the threads and the partition, and provides the scratch memory.
#pragma once

#include "core/layer.h"
#include "core/team.h"
#include "cpu/plan.h"

namespace rnnfast {

// `layers` has the one or two directions of one layer, of the same sizes; they may run side by side,
// each with half of the threads. The call uses at most `threads` threads. All functions throw
// OutOfMemory or std::bad_alloc; the outputs of the first direction may then be written.
template <class T>
void run_forward(int cell, const Layer<T>* layers, int directions, int threads);
// The gradient of x is the sum over the directions.
template <class T>
void run_backward(int cell, const Layer<T>* layers, const Gradients<T>* grads, int directions,
                  int threads);

// A wavefront over layers of one direction: `columns` layers run at a time, each by its own team, which
// is some steps behind the team of the layer that it reads. There is no wavefront where columns is 1.
struct Wavefront {
  int columns = 1;
  int team = 1;  // threads of a team
  Split split = Split::rows;
  double seconds = 0;

  explicit operator bool() const { return columns > 1; }
};

// Plans a wavefront where it is faster than one layer after the other. Only the sizes of the layers
// matter. run_forward and run_backward take the same layers in the order of processing: backward starts
// with the last layer. Every layer then needs its own x and y, or its own gradients of them.
template <class T>
Wavefront wavefront(int cell, const Layer<T>* layers, int count, bool backward, int threads);
template <class T>
void run_forward(int cell, const Wavefront& plan, const Layer<T>* layers, int count);
template <class T>
void run_backward(int cell, const Wavefront& plan, const Layer<T>* layers, const Gradients<T>* grads,
                  int count);

}  // namespace rnnfast
