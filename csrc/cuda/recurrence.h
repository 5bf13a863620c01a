// The plain structs that cross from the binding to a kernel. Addresses are the device's; strides are in
// elements. As in layer.h nothing here is owned, inputs may alias each other, an output aliases nothing
// else, and the binding has checked every size.
#pragma once

#include <cstdint>

#include "cells/info.h"
#include "core/layer.h"

namespace rnnfast {

// A half-precision number in memory (IEEE 754 binary16).
struct Float16 {
  std::uint16_t bits;
};
template <>
struct RealOf<Float16> {
  using type = float;
};

// One direction of one layer. The framework has multiplied the input: what is left is the recurrence.
// B rows of T steps, H hidden units; G gate blocks in torch's weights, S gates of the cell (slots
// without the cell state).
template <class T>
struct Recurrence {
  int steps, batch, hidden;  // T, B, H
  bool reverse;              // from the last step to the first
  // [T + 1]: packed, step t has the rows first[t] to first[t + 1] of every sequence. Null: all have B.
  const std::int64_t* first;
  Resets resets;
  Sequence<const T> products;  // [T, B, G * H]: W_ih x + b_ih
  Matrix<const T> w_hh;        // [G * H, H]
  const T* b_hh;               // [G * H]; null means zeros
  Matrix<const T> h0, c0;      // [B, H]; null means zeros
  Sequence<T> y;               // [T, B, H]
  // [T, B, H], of cells with a cell state; null: not wanted, inference only.
  Sequence<Real<T>> cell_states;
  Sequence<T> gates;   // [T, B, S * H], in the order of slots; null: inference
  Matrix<T> h_n, c_n;  // [B, H]; null: not wanted

  // Of backward, which reads y, cell states and gates as forward left them. Null means zeros.
  Sequence<const T> dy, dcell_states;  // incoming, [T, B, H]
  Matrix<const T> dh_n, dc_n;          // incoming, [B, H]
  Sequence<T> dgates;                  // outgoing, [T, B, S * H], of the pre-activations
  Matrix<T> dh0, dc0;                  // outgoing, [B, H]; null: not wanted
};

// How a product's output is cut into tiles, and its sum over k into pieces that are added afterwards.
// Worker w, a warp or a thread, has the items w, w + workers, ...; item i is piece i / row_tiles of the
// tiles of rows i % row_tiles.
struct Schedule {
  int row_tiles, depth_tiles;  // the latter rounded up to an even number
  int pieces, piece_tiles;     // of each sum; tiles of depth in each, an even number
};

// Who computes what. A group is the blocks that share the weights of one layer and direction, for one
// slice of the batch's rows; each block has some hidden units, with all their gates.
enum class Tier {
  block,    // a group is one block: nobody to wait for
  cluster,  // the blocks of a group reach each other's shared memory
  grid,     // they meet in device memory, and are all resident
};

inline constexpr int most_steps = 1 << 24;  // counters of meetings stay far from their end

struct Plan {
  Tier tier;
  int groups, blocks;  // groups of a direction; blocks of a group
  int rows, units;     // of the batch in a group; hidden units in a block, a multiple of 8
  int chunk;           // rows of an operand that a block has at a time: fewer than all only on a grid
  Schedule schedule[most_stages];
  int shared_bytes;     // of a block
  long exchange_bytes;  // of device memory, for all groups of a direction; 0 unless the tier is grid
};

// What a launch gets: up to two directions of one layer, of one shape, side by side.
template <class T>
struct Launch {
  Recurrence<T> direction[2];
  int directions;
  Plan plan;
  unsigned* counters;  // one for each group, zero; unless the tier is grid: null
  void* exchange;      // Plan::exchange_bytes for each direction, 16-byte aligned, likewise
};

}  // namespace rnnfast
