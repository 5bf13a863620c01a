// The plain structs that cross from the binding to a kernel. Strides are in elements. Every sequence is
// time-major in meaning ([T, B, features]); batch_first and reversed directions are strides and a base
// address, never a copy. Inputs may alias each other; an output aliases nothing else. Nothing here is
// owned: all memory outlives the call, and the binding has checked every size.
#pragma once

#include "core/numbers.h"

namespace rnnfast {

// Where memory is; the numbers are DLPack's.
enum class Place { cpu = 1, cuda = 2 };

// Element (t, b, k) lies at data[t * step + b * row + k]; features are contiguous. May be null. Where
// the rows of a layer differ in length, Ragged says where it lies.
template <class T>
struct Sequence {
  T* data;
  index step, row;
};

// Element (t, b) of [T, B]. Where it is not zero, row b's states are zero before step t, and no
// gradient passes there. May be null.
using Resets = Sequence<const std::uint8_t>;

// Rows of different lengths: step t has only the rows b < count[t] of the batch, where the longest
// comes first; before[t] is the number of rows of all steps before it, and first[t] of all steps before
// it in the order of memory. Steps are in the order of processing; in the order of memory counts never
// grow. Null pointers: every step has the whole batch.
//
// Where `packed` is not null the sequences are packed as torch's PackedSequence: the first row of step
// t is row packed[t] of every sequence. Where `packed` is null the sequences are padded. Row b of the
// batch is row order[b] of every step and of every matrix of states. Where `order` is null it is row b.
struct Ragged {
  const index *first, *count, *before, *order, *packed;

  // The row of a state.
  RNNFAST_INLINE index place(index b) const { return order ? order[b] : b; }

  // The row of a sequence that belongs to step t of row b.
  template <class T>
  RNNFAST_INLINE T* row(Sequence<T> of, index t, index b) const {
    return packed ? of.data + (packed[t] + place(b)) * of.row
                  : of.data + t * of.step + place(b) * of.row;
  }
};

// Element (r, k) lies at data[r * row + k]; features are contiguous. May be null.
template <class T>
struct Matrix {
  T* data;
  index row;
};

// One direction of one layer. G is the number of gate blocks in torch's weights, R the width of h: that
// of the projection where there is one (Sak et al. 2014, arXiv 1402.1128), otherwise H.
template <class T>
struct Layer {
  index steps, batch, inputs, hidden, outputs;  // T, B, I, H, R
  Ragged ragged;
  Resets resets;
  Sequence<const T> x;      // [T, B, I]
  Matrix<const T> h0, c0;   // [B, R], [B, H]; null means zeros; c0 only for cells with a cell state
  Matrix<const T> w_ih;     // [G * H, I]
  Matrix<const T> w_hh;     // [G * H, R]
  const T *b_ih, *b_hh;     // [G * H]; null means zeros
  Matrix<const T> w_hr;     // [R, H], only for cells that can be projected; null: h is not projected
  Sequence<T> y;            // [T, B, R]; forward writes it and reads it back as the state
  Sequence<T> cell_states;  // [T, B, H]; null: not wanted; inference and training
  Matrix<T> h_n, c_n;       // [B, R], [B, H]; null: not wanted
  Real<T>* saved;           // a chunk of steps: [blocks][its rows][slots][lanes]; null: inference
  T* panels;                // packed weights that the caller holds; null: none
};

// What backward reads and writes besides the Layer of the forward call, whose y and saved it reads.
template <class T>
struct Gradients {
  Sequence<const T> y;            // incoming, [T, B, R]; null means zeros
  Sequence<const T> cell_states;  // incoming, [T, B, H]; null means zeros
  Matrix<const T> h_n, c_n;       // incoming, [B, R], [B, H]; null means zeros
  Sequence<T> x;                  // the outgoing ones; null: not wanted
  bool x_accumulate;              // add to x rather than overwrite it
  Matrix<T> h0, c0;
  Matrix<T> w_ih, w_hh;
  T *b_ih, *b_hh;
  Matrix<T> w_hr;
};

}  // namespace rnnfast
