// Where the states of a layer lie in memory while it runs; shared by the forward and the backward loop.
#pragma once

#include "cpu/kernels/product.h"

namespace rnnfast::RNNFAST_TARGET {

// The number of blocks of units. A block has the units of one vector; the last block is padded.
template <class T>
constexpr index blocks_of(index units) {
  return (units + lanes<T> - 1) / lanes<T>;
}

// Whether h is a projection of what the cell returns.
template <class Cell, class T>
constexpr bool is_projected(const Layer<T>& layer) {
  return Cell::projects && layer.w_hr.data;
}

// The width of the operand of stage s, which is h in the first stage.
template <class T>
constexpr index operand_width(const Layer<T>& layer, int s) {
  return s == 0 ? layer.outputs : layer.hidden;
}

// The number of zeros that can stand for any row of states, and for `init` of any tile.
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

// Deals rows that are sorted by length to parts, forwards and backwards in turn: part 0 of two has the
// rows 0, 3, 4, 7, 8. All parts then have about equally many rows, at every step and over all steps.
struct Deal {
  index parts = 1, part = 0;

  // The part's row number j.
  constexpr index row(index j) const { return parts * j + (j % 2 ? parts - 1 - part : part); }
  // How many of the first n rows the part has. Every step calls it several times. Most layers are not
  // dealt, and must not pay for a division.
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
  index block;  // the distance from one block to the next
  Deal deal;

  Real<T>* at(index n, index b) const {
    return data + n * block + deal.row(b) * (Cell::slots * lanes<T>);
  }
};

// The memory of the slots, chunk by chunk: [blocks][rows of the chunk][slots][lanes]. A layer may have
// only some of the rows.
//
// Tried: slots row by row instead of block by block, so that threads share no cache lines, cost nothing
// for small batches and 5 percent for large ones.
// Tried: non-temporal stores change nothing at T=50 and are slower at B=8.
template <class T>
struct SlotMemory {
  Real<T>* data;             // the slots of row 0
  index batch;               // rows of the batch
  const index* rows_before;  // Ragged::rows_before of the batch; null: every step has the whole batch
  Deal deal;                 // which of the rows the layer has
  bool holds_all;            // whether the memory holds all chunks, or the last two
};

template <class Cell, class T>
struct States {
  const Layer<T>* layer;
  const Real<T>* zeros;  // zeros_of(layer)
  const Real<T>* c0;     // [blocks][B][lanes]
  SlotMemory<T> memory;
  index chunk;  // steps

  // The steps of a chunk, whose input products are computed ahead: enough rows to fill the tiles, few
  // enough to stay in the L2 cache until the recurrence reads them. Like all memory, the chunk does not
  // depend on the team.
  static index chunk_steps(const Layer<T>& layer, index batch) {
    constexpr index l2_share = 256 * 1024, least_rows = 48;
    const index step_bytes = batch * saved_row<Cell, T>(layer.hidden) * index{sizeof(Real<T>)};
    index steps = l2_share / (step_bytes + 1);
    const index least = least_rows / (batch + 1) + 1;
    if (steps < least) steps = least;
    return steps < layer.steps ? steps : layer.steps;
  }

  // The number of rows of step t, and of all steps before it.
  index count(index t) const { return layer->ragged.count ? layer->ragged.count[t] : layer->batch; }
  index rows_before(index t) const {
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
    // Where all chunks are held, ragged rows lie without gaps. Inference holds two chunks, and there
    // every step has room for the whole batch: a thread may be two chunks ahead of another, so that a
    // row must have the same place in every chunk.
    const auto slots_before = [&](index s) {
      return memory.holds_all && memory.rows_before ? memory.rows_before[s] : s * memory.batch;
    };
    const index offset = memory.holds_all ? slots_before(begin) : number % 2 * chunk * memory.batch;
    return {memory.data +
                (offset * blocks_of<T>(layer->hidden) + slots_before(t) - slots_before(begin)) * size,
            (slots_before(end) - slots_before(begin)) * size, memory.deal};
  }

  // The place of a block of step t in numbers of which each block has one for each row:
  // [T][blocks][rows]. Like the slots, they have the rows of the whole batch.
  index block_of_step(index t, index block, index blocks) const {
    const index* before = memory.rows_before;
    return before ? before[t] * blocks + block * (before[t + 1] - before[t])
                  : (t * blocks + block) * memory.batch;
  }

  // Whether row b has a step before t. If not, its state before t is the initial state.
  bool continues(index t, index b) const { return t > 0 && b < count(t - 1); }

  // Whether the state of row b before t is reset to zero.
  bool resets(index t, index b) const { return layer->resets.data && *row(layer->resets, t, b); }

  // h before step t: a row of `outputs` numbers.
  const T* h(index t, index b) const {
    const T* zero_row = reinterpret_cast<const T*>(zeros);
    if (resets(t, b)) return zero_row;
    if (continues(t, b)) return row(layer->y, t - 1, b);
    return layer->h0.data ? layer->h0.data + layer->ragged.batch_row(b) * layer->h0.row : zero_row;
  }

  // c before step t: the address of block 0, and the distance from one block to the next.
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

// The rows of a strip. A loop holds the addresses of one strip of rows at a time.
inline constexpr index strip = 256;

// Some rows of a deal.
struct Rows {
  Range range;
  Deal deal{};

  constexpr index size() const { return range.size(); }
  // The row of the batch that is row j of these rows.
  constexpr index operator[](index j) const { return deal.row(range.begin + j); }
  // The rows that a step of `count` rows has.
  constexpr Rows present(index count) const {
    const index n = deal.count(count);
    return {{range.begin < n ? range.begin : n, range.end < n ? range.end : n}, deal};
  }
  // The strip that begins at row j.
  constexpr Rows strip_from(index j) const {
    const index begin = range.begin + j, end = begin + strip;
    return {{begin, end < range.end ? end : range.end}, deal};
  }
};

// The addresses of a step's slots, of the states before it, and of its outputs (or their gradients),
// for a strip of rows. They are gathered once, so that the loops over the blocks of units have no
// branches.
template <class Cell, class T, class Y>
struct RowsOfStep {
  RowsOfStep(const States<Cell, T>& states, Sequence<Y> outputs, index t, Rows rows) {
    const Slots<Cell, T> current = states.slots(t), previous = states.slots(t > 0 ? t - 1 : 0);
    block = current.block;
    for (index r = 0; r < rows.size(); ++r) {
      b[r] = rows[r];
      slots[r] = current.at(0, b[r]);
      h[r] = states.h(t, b[r]);
      c[r] = states.c(previous, t, b[r]);
      y[r] = outputs.data ? states.row(outputs, t, b[r]) : nullptr;
    }
  }

  index b[strip];         // the row of the batch
  Real<T>* slots[strip];  // the slots of block 0
  index block;            // the distance from the slots of one block to those of the next
  const T* h[strip];
  typename States<Cell, T>::C c[strip];
  Y* y[strip];
};

// Copies rows of the caller's [B, width] to [blocks][B][lanes]; a null matrix means zeros.
template <class T>
void to_blocks(Real<T>* to, Matrix<const T> from, const Layer<T>& layer, index width, Rows rows,
               Range blocks) {
  for (index block = blocks.begin; block < blocks.end; ++block)
    for (index r = 0; r < rows.size(); ++r) {
      const index unit = block * lanes<T>;
      const index b = rows[r], row = layer.ragged.batch_row(b);
      store(to + (block * layer.batch + b) * lanes<T>,
            from.data ? load_some(from.data + row * from.row + unit, width - unit) : Vector<T>{});
    }
}

// The inverse of to_blocks.
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

// The share of a thread: all blocks of some rows, or all rows of some blocks.
struct Part {
  Rows rows;
  Range blocks, outputs;  // blocks of the hidden units and of h: the same unless h is projected
  index first_row = 0;    // how many rows the parts before it have
};

// The rows that a thread prepares for reading. Where the units are split, all threads read all rows,
// and each thread prepares a share of them.
inline Rows rows_once(index batch, const Team& team, Part part) {
  return team.split == Split::units ? Rows{share(batch, team.size, team.rank)} : part.rows;
}

template <class T>
Part part_of(const Layer<T>& layer, const Team& team) {
  const Range rows{0, layer.batch};
  const Range blocks{0, blocks_of<T>(layer.hidden)}, outputs{0, blocks_of<T>(layer.outputs)};
  const auto share_of = [&](Range all) { return share(all.end, team.size, team.rank); };
  if (team.split == Split::units) return {{rows}, share_of(blocks), share_of(outputs)};
  if (!layer.ragged.count) return {{share_of(rows)}, blocks, outputs, share_of(rows).begin};
  const Deal deal{team.size, team.rank};
  index first_row = 0;
  for (int k = 0; k < team.rank; ++k) first_row += Deal{team.size, k}.count(layer.batch);
  return {{{0, deal.count(layer.batch)}, deal}, blocks, outputs, first_row};
}

}  // namespace rnnfast::RNNFAST_TARGET
