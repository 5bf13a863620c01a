// Where the states of a layer lie in memory while it runs; shared by the forward and the backward loop.
#pragma once

#include "gemm.h"

namespace rnnfast::RNNFAST_TARGET {

// Hidden units are handled in blocks of one vector; the last block is padded.
template <class T>
constexpr index blocks_of(index units) {
  return (units + lanes<T> - 1) / lanes<T>;
}

// Numbers in one step of Layer::saved: [blocks][B][slots][lanes].
template <class Cell, class T>
constexpr index saved_step(index batch, index hidden) {
  return blocks_of<T>(hidden) * batch * Cell::slots * lanes<T>;
}

template <class Cell, class T>
struct States {
  const Layer<T>* layer;
  const T* zeros;  // `hidden` of them
  const T* c0;     // [blocks][B][lanes]
  T* slots;        // [ring][blocks][B][slots][lanes]
  index ring;      // the steps held; step t is at t % ring

  T* slot(index t, index block, index b) const {
    return slots + t % ring * saved_step<Cell, T>(layer->batch, layer->hidden) +
           (block * layer->batch + b) * Cell::slots * lanes<T>;
  }

  // h before step t: a row of `hidden` numbers.
  const T* h(index t, index b) const {
    if (t > 0) return layer->y.data + (t - 1) * layer->y.step + b * layer->y.row;
    return layer->h0.data ? layer->h0.data + b * layer->h0.row : zeros;
  }

  // c before step t.
  Vector<T> c(index t, index block, index b) const {
    if constexpr (Cell::cell_state < 0)
      return Vector<T>{};
    else
      return t > 0 ? load(slot(t - 1, block, b) + Cell::cell_state * lanes<T>)
                   : load(c0 + (block * layer->batch + b) * lanes<T>);
  }
};

// Between [B, H] in the caller's memory and [blocks][B][lanes]; a null matrix reads as zeros.
template <class T>
void to_blocks(T* to, Matrix<const T> from, index batch, index hidden, Range rows, Range blocks) {
  for (index block = blocks.begin; block < blocks.end; ++block)
    for (index b = rows.begin; b < rows.end; ++b) {
      const index unit = block * lanes<T>;
      store(to + (block * batch + b) * lanes<T>,
            from.data ? load_some(from.data + b * from.row + unit, hidden - unit) : Vector<T>{});
    }
}

template <class T>
void from_blocks(Matrix<T> to, const T* from, index batch, index hidden, Range rows, Range blocks) {
  for (index block = blocks.begin; block < blocks.end; ++block)
    for (index b = rows.begin; b < rows.end; ++b) {
      const index unit = block * lanes<T>;
      store_some(to.data + b * to.row + unit, load(from + (block * batch + b) * lanes<T>),
                 hidden - unit);
    }
}

// The share of a thread: all blocks of some rows, or all rows of some blocks.
struct Part {
  Range rows, blocks;
};

inline Part part_of(const Team& team, index batch, index blocks) {
  if (team.split == Split::rows) return {share(batch, team.size, team.rank), {0, blocks}};
  return {{0, batch}, share(blocks, team.size, team.rank)};
}

}  // namespace rnnfast::RNNFAST_TARGET
