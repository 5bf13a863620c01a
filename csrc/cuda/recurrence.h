// The plain structs that cross from the binding to a kernel. Addresses are the device's; strides are in
// elements. As in layer.h no struct owns memory, inputs may alias each other, an output aliases nothing
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

// The recurrence of one direction of one layer; the framework computes the input products. B rows, T
// steps, H hidden units, G gate blocks in torch's weights, S gates of the cell (slots without the cell
// state).
template <class T>
struct Recurrence {
  int steps, batch, hidden;  // T, B, H
  bool reverse;              // from the last step to the first
  // [T + 1]; step t has the rows step_begin[t] to step_begin[t + 1] of every packed sequence. Null:
  // sequences are not packed, and every step has B rows.
  const std::int64_t* step_begin;
  Resets resets;
  Sequence<const T> products;  // [T, B, G * H]: W_ih x + b_ih
  Matrix<const T> w_hh;        // [G * H, H]
  const T* b_hh;               // [G * H]; null means zeros
  Matrix<const T> h0, c0;      // [B, H]; null means zeros
  Sequence<T> y;               // [T, B, H]
  // [T, B, H], for cells with a cell state; null: not wanted, which only inference allows.
  Sequence<Real<T>> cell_states;
  Sequence<T> gates;   // [T, B, S * H], in the order of slots; null: inference
  Matrix<T> h_n, c_n;  // [B, H]; null: not wanted

  // For backward, which also reads y, cell_states and gates of forward. Null means zeros.
  Sequence<const T> dy, dcell_states;  // incoming, [T, B, H]
  Matrix<const T> dh_n, dc_n;          // incoming, [B, H]
  Sequence<T> dgates;                  // outgoing, [T, B, S * H], of the pre-activations
  Matrix<T> dh0, dc0;                  // outgoing, [B, H]; null: not wanted
};

// How a product's output is cut into tiles, and its sum over k into pieces, which are added afterwards.
// Worker w has the items w, w + workers, ...; item i is piece i / row_tiles of row tile i % row_tiles.
struct Schedule {
  int row_tiles, depth_tiles;  // depth_tiles is rounded up to an even number
  int pieces, piece_tiles;     // pieces of a sum; depth tiles of a piece, an even number
};

// How the blocks of a group exchange states. A group is the blocks that share the weights of one layer
// and direction, for some rows of the batch. Each block has some hidden units, with all their gates.
enum class Tier {
  block,    // a group is one block: there is no exchange
  cluster,  // through the blocks' shared memory
  grid,     // through device memory; all blocks are resident
};

inline constexpr int most_steps = 1 << 24;  // so that Launch::counters do not overflow

struct Plan {
  Tier tier;
  int groups, blocks;  // groups of a direction; blocks of a group
  int rows, units;     // rows of a group; hidden units of a block, a multiple of 8
  int chunk;  // rows of the operand in shared memory at a time: fewer than `rows` only on a grid
  Schedule schedule[most_stages];
  int shared_bytes;     // of shared memory, for a block
  long exchange_bytes;  // of device memory, for all groups of a direction; 0 unless the tier is grid
};

// The arguments of a launch: one layer, its one or two directions side by side.
template <class T>
struct Launch {
  Recurrence<T> direction[2];
  int directions;
  Plan plan;
  // Null unless the tier is grid.
  unsigned* counters;  // one for each group, zero before the launch
  void* exchange;      // Plan::exchange_bytes for each direction, 16-byte aligned
};

}  // namespace rnnfast
