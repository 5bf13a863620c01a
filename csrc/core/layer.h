// The plain structs that cross from the binding to a kernel. Strides are in elements. Every sequence is
// time-major in meaning ([T, B, features]); batch_first and reversed directions are strides and a base
// address, never a copy. Inputs may alias each other; an output aliases nothing else. No struct owns
// memory: all memory outlives the call, and the binding has checked every size.
#pragma once

#include "core/numbers.h"

namespace rnnfast {

// Where memory is; the values are DLPack's.
enum class Place { cpu = 1, cuda = 2 };

// Element (t, b, k) lies at data[t * step + b * row + k]; features are contiguous. May be null. Where
// the rows of a layer differ in length, Ragged says where an element lies.
template <class T>
struct Sequence {
  T* data;
  index step, row;
};

// Element (t, b) of [T, B]. Where it is not zero, row b's states are zero before step t, and no
// gradient passes there. May be null.
using Resets = Sequence<const std::uint8_t>;

// Rows of different lengths. The rows of the batch are sorted, the longest first, and step t has the
// rows b < count[t]. Steps are in the order of processing: rows_before[t] is the number of rows of all
// steps that are processed before step t. first_row[t] is the number of rows of all steps that lie
// before step t in memory, where counts never grow. Null pointers: every step has the whole batch.
//
// Where `packed` is not null the sequences are packed as torch's PackedSequence: the first row of step
// t is row packed[t] of every sequence. Where `packed` is null the sequences are padded. Sorted row b
// is row order[b] of every step and of every matrix of states; where `order` is null it is row b.
struct Ragged {
  const index *first_row, *count, *rows_before, *order, *packed;

  // The row of the caller's batch that is sorted row b.
  RNNFAST_INLINE index batch_row(index b) const { return order ? order[b] : b; }

  // The features of sorted row b at step t.
  template <class T>
  RNNFAST_INLINE T* row(Sequence<T> sequence, index t, index b) const {
    return packed ? sequence.data + (packed[t] + batch_row(b)) * sequence.row
                  : sequence.data + t * sequence.step + batch_row(b) * sequence.row;
  }
};

// Element (r, k) lies at data[r * row + k]; features are contiguous. May be null.
template <class T>
struct Matrix {
  T* data;
  index row;
};

// One direction of one layer. G is the number of gate blocks in torch's weights. R is the width of h:
// the width of the projection where there is one (Sak et al. 2014, arXiv 1402.1128), otherwise H.
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
  Matrix<const T> w_hr;     // [R, H], only for cells that can project; null: h is not projected
  Sequence<T> y;            // [T, B, R]; forward writes it and reads it back as the state
  Sequence<T> cell_states;  // [T, B, H]; null: not wanted
  Matrix<T> h_n, c_n;       // [B, R], [B, H]; null: not wanted
  Real<T>* saved;           // by chunks: [blocks][rows of the chunk][slots][lanes]; null: inference
  T* panels;                // packed weights that the caller holds; null: none
  int parts;  // of float32: into how many bfloat16 numbers products split a number; 0: into none
};

// What backward reads and writes besides the Layer of the forward call. Backward also reads y and saved
// of that Layer.
template <class T>
struct Gradients {
  Sequence<const T> y;            // incoming, [T, B, R]; null means zeros
  Sequence<const T> cell_states;  // incoming, [T, B, H]; null means zeros
  Matrix<const T> h_n, c_n;       // incoming, [B, R], [B, H]; null means zeros
  Sequence<T> x;                  // outgoing, as all that follow; null: not wanted
  bool x_accumulate;              // add to x rather than overwrite it
  Matrix<T> h0, c0;
  Matrix<T> w_ih, w_hh;
  T *b_ih, *b_hh;
  Matrix<T> w_hr;
  // The squares of dL/dh_t and dL/dc_t, summed over the units of each vector: [T][blocks of R][rows of
  // the step] and [T][blocks of H][rows of the step], in the order of processing. Null: not wanted.
  double *h_squares, *c_squares;
};

}  // namespace rnnfast
