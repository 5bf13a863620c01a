// Where the states of a layer lie in memory while it runs; shared by the forward and the backward loop.
#pragma once

#include "cpu/kernels/product.h"

namespace rnnfast::RNNFAST_TARGET {

// Hidden units are handled in blocks of one vector; the last block is padded.
template <class T>
constexpr index blocks_of(index units) {
  return (units + lanes<T> - 1) / lanes<T>;
}

// Whether h is a projection of what the cell returns.
template <class Cell, class T>
constexpr bool is_projected(const Layer<T>& layer) {
  return Cell::projects && layer.w_hr.data;
}

// The width of what stage s multiplies, h in the first.
template <class T>
constexpr index operand_width(const Layer<T>& layer, int s) {
  return s == 0 ? layer.outputs : layer.hidden;
}

// Zeros that stand for any row of states, and for the start of any tile.
template <class T>
constexpr index zeros_of(const Layer<T>& layer) {
  const index widest = layer.hidden < layer.outputs ? layer.outputs : layer.hidden;
  return widest < 3 * lanes<T> ? 4 * lanes<T> : widest + lanes<T>;
}

// Numbers in Layer::saved for one row of x.
template <class Cell, class T>
constexpr index saved_row(index hidden) {
  return blocks_of<T>(hidden) * Cell::slots * lanes<T>;
}

// Rows that are sorted by length, dealt to parts forwards and backwards in turn: part 0 of two has the
// rows 0, 3, 4, 7, 8. All parts then have about equally many rows of every step, and of all steps.
struct Deal {
  index parts = 1, part = 0;

  // The part's row number j.
  constexpr index row(index j) const { return parts * j + (j % 2 ? parts - 1 - part : part); }
  // How many of the first n rows the part has. A step asks several times: most layers are not dealt,
  // and must not pay for a division.
  constexpr index count(index n) const {
    if (parts == 1) return n;
    const index rounds = n / parts;
    return rounds + (row(rounds) < n ? 1 : 0);
  }
};

// The slots of one step.
template <class Cell, class T>
struct Slots {
  Real<T>* data;
  index block;  // from one to the next
  Deal deal;

  Real<T>* at(index n, index b) const {
    return data + n * block + deal.row(b) * (Cell::slots * lanes<T>);
  }
};

// The memory of the slots, chunk by chunk: [blocks][rows of the chunk][slots][lanes]. The layer may
// have only some of the rows.
//
// Tried: slots row by row rather than block by block, so that threads share no cache lines, cost
// nothing for small batches and 5 percent for large ones. Tried: stores past the caches (non-temporal)
// change nothing at T=50 and are slower at B=8.
template <class T>
struct SlotMemory {
  Real<T>* data;        // the slots of row 0
  index batch;          // all rows of the batch
  const index* before;  // Ragged::rows_before of all rows; null: every step has the whole batch
  Deal deal;            // which of the rows the layer has
  bool all;             // whether all chunks are held, or only the last two
};

template <class Cell, class T>
struct States {
  const Layer<T>* layer;
  const Real<T>* zeros;  // zeros_of(layer)
  const Real<T>* c0;     // [blocks][B][lanes]
  SlotMemory<T> memory;
  index chunk;  // steps

  // Steps whose input products are computed ahead: enough rows to fill the tiles, few enough to stay in
  // the L2 cache until the recurrence reads them. The same for any team, as is all memory.
  static index chunk_steps(const Layer<T>& layer, index batch) {
    constexpr index l2_share = 256 * 1024, fill = 48;
    const index step_bytes = batch * saved_row<Cell, T>(layer.hidden) * index{sizeof(Real<T>)};
    index steps = l2_share / (step_bytes + 1);
    const index least = fill / (batch + 1) + 1;
    if (steps < least) steps = least;
    return steps < layer.steps ? steps : layer.steps;
  }

  // The rows of step t, and how many come before it.
  index count(index t) const { return layer->ragged.count ? layer->ragged.count[t] : layer->batch; }
  index before(index t) const {
    return layer->ragged.rows_before ? layer->ragged.rows_before[t] : t * layer->batch;
  }

  template <class U>
  U* row(Sequence<U> sequence, index t, index b) const {
    return layer->ragged.row(sequence, t, b);
  }

  Slots<Cell, T> slots(index t) const {
    constexpr index size = Cell::slots * lanes<T>;
    const index number = t / chunk, begin = number * chunk;
    const index end = begin + chunk < layer->steps ? begin + chunk : layer->steps;
    // Ragged rows lie without gaps where all chunks are held. The two halves that inference uses in
    // turn have every row at its own place modulo the batch: a thread may be two chunks ahead of
    // another.
    const auto rows_before = [&](index s) {
      return memory.all && memory.before ? memory.before[s] : s * memory.batch;
    };
    const index place = memory.all ? rows_before(begin) : number % 2 * chunk * memory.batch;
    return {memory.data +
                (place * blocks_of<T>(layer->hidden) + rows_before(t) - rows_before(begin)) * size,
            (rows_before(end) - rows_before(begin)) * size, memory.deal};
  }

  // Whether row b has a step before t; if not, its state there is the initial one.
  bool continues(index t, index b) const { return t > 0 && b < count(t - 1); }

  // Whether its state there is zero instead.
  bool resets(index t, index b) const { return layer->resets.data && *row(layer->resets, t, b); }

  // h before step t: a row of `outputs` numbers.
  const T* h(index t, index b) const {
    const T* none = reinterpret_cast<const T*>(zeros);
    if (resets(t, b)) return none;
    if (continues(t, b)) return row(layer->y, t - 1, b);
    return layer->h0.data ? layer->h0.data + layer->ragged.batch_row(b) * layer->h0.row : none;
  }

  // c before step t: where that of block 0 lies, and how far it is from one block to the next.
  struct C {
    const Real<T>* data;
    index block;
  };
  C c(Slots<Cell, T> previous, index t, index b) const {
    if constexpr (Cell::cell_state < 0)
      return {zeros, 0};
    else
      return resets(t, b)      ? C{zeros, 0}
             : continues(t, b) ? C{previous.at(0, b) + Cell::cell_state * lanes<T>, previous.block}
                               : C{c0 + b * lanes<T>, layer->batch * lanes<T>};
  }
};

// Rows whose addresses are held at once.
inline constexpr index group = 256;

// Some of the rows that a deal gives.
struct Rows {
  Range range;
  Deal deal{};

  constexpr index size() const { return range.size(); }
  // The number in the batch of row j of these.
  constexpr index operator[](index j) const { return deal.row(range.begin + j); }
  // Those that are there when a step has `count` rows.
  constexpr Rows present(index count) const {
    const index n = deal.count(count);
    return {{range.begin < n ? range.begin : n, range.end < n ? range.end : n}, deal};
  }
  // At most as many as a group, from number `first` on.
  constexpr Rows group_from(index first) const {
    const index begin = range.begin + first, end = begin + group;
    return {{begin, end < range.end ? end : range.end}, deal};
  }
};

// The slots of a step, the states before it, and its outputs (or their gradients), for a group of rows.
// Gathered once, so that the loops over the blocks of units find no branches.
template <class Cell, class T, class Y>
struct RowsOfStep {
  RowsOfStep(const States<Cell, T>& states, Sequence<Y> y_of, index t, Rows rows) {
    const Slots<Cell, T> of = states.slots(t), previous = states.slots(t > 0 ? t - 1 : 0);
    block = of.block;
    for (index r = 0; r < rows.size(); ++r) {
      b[r] = rows[r];
      slots[r] = of.at(0, b[r]);
      h[r] = states.h(t, b[r]);
      c[r] = states.c(previous, t, b[r]);
      y[r] = y_of.data ? states.row(y_of, t, b[r]) : nullptr;
    }
  }

  index b[group];         // the row's number in the batch
  Real<T>* slots[group];  // those of block 0
  index block;            // from the slots of one block to those of the next
  const T* h[group];
  typename States<Cell, T>::C c[group];
  Y* y[group];
};

// Between [B, width] in the caller's memory and [blocks][B][lanes]; a null matrix reads as zeros.
template <class T>
void to_blocks(Real<T>* to, Matrix<const T> from, const Layer<T>& layer, index width, Rows rows,
               Range blocks) {
  for (index block = blocks.begin; block < blocks.end; ++block)
    for (index r = 0; r < rows.size(); ++r) {
      const index unit = block * lanes<T>;
      const index b = rows[r], place = layer.ragged.batch_row(b);
      store(to + (block * layer.batch + b) * lanes<T>,
            from.data ? load_some(from.data + place * from.row + unit, width - unit) : Vector<T>{});
    }
}

template <class T>
void from_blocks(Matrix<T> to, const Real<T>* from, const Layer<T>& layer, index width, Rows rows,
                 Range blocks) {
  for (index block = blocks.begin; block < blocks.end; ++block)
    for (index r = 0; r < rows.size(); ++r) {
      const index unit = block * lanes<T>;
      const index b = rows[r];
      store_some(to.data + layer.ragged.batch_row(b) * to.row + unit,
                 load(from + (block * layer.batch + b) * lanes<T>), width - unit);
    }
}

// The share of a thread: all blocks of some rows, or all rows of some blocks of the hidden units and of
// h, which are the same unless h is projected.
struct Part {
  Rows rows;
  Range blocks, outputs;
};

// Of the rows that a thread reads, those that it alone prepares: a share, where all threads read all.
inline Rows rows_once(index batch, const Team& team, Part part) {
  return team.split == Split::units ? Rows{share(batch, team.size, team.rank)} : part.rows;
}

template <class T>
Part part_of(const Layer<T>& layer, const Team& team) {
  const Range rows{0, layer.batch};
  const Range blocks{0, blocks_of<T>(layer.hidden)}, outputs{0, blocks_of<T>(layer.outputs)};
  const auto own = [&](Range all) { return share(all.end, team.size, team.rank); };
  if (team.split == Split::units) return {{rows}, own(blocks), own(outputs)};
  if (!layer.ragged.count) return {{own(rows)}, blocks, outputs};
  const Deal deal{team.size, team.rank};
  return {{{0, deal.count(layer.batch)}, deal}, blocks, outputs};
}

}  // namespace rnnfast::RNNFAST_TARGET
