// The reversed time loop over any cell, for the rows of a batch that belong together, and the gradients
// of inputs and weights.
//
// A chunk of steps at a time, latest first: the loop leaves the gradients of the chunk's
// pre-activations in d, [blocks][rows of the chunk][gates][lanes], and what multiplied the recurrent
// weights in operand, [rows of the chunk][hidden]. Read along its rows d is the left side of the
// products that give the gradients of states and inputs; read down its rows each block is a panel, and
// the weight gradients are "features times panel". Sums over time and batch run in one fixed order, the
// latest chunk first, whatever the threads.
#pragma once

#include "states.h"

namespace rnnfast::RNNFAST_TARGET {

// The weights, packed for products with the gradients of gates.
template <class Cell, class T>
struct BackwardPanels {
  T *stage[Cell::stages], *input;  // [blocks of columns][block, gate, lane][lanes]
  T* zeros;                        // at least `hidden`, and at least four vectors

  static constexpr index stage_size(int s, index blocks) {
    return blocks * Cell::recurrent[s].width() * lanes<T> * lanes<T>;
  }
  static constexpr index input_size(index blocks) {
    return blocks * Cell::input.width() * lanes<T> * lanes<T>;
  }
};

inline constexpr index l2_bytes = 640 * 1024;  // what the gradients of the weights may have of it

template <class Cell, class T>
class BackwardLoop {
 public:
  // `saved_batch`: the rows of a step in layer.saved. From a null arena it only counts its memory.
  BackwardLoop(const Layer<T>& layer, const Gradients<T>& grads, index saved_batch,
               const BackwardPanels<Cell, T>& panels, Arena& arena)
      : layer_(layer), grads_(grads), panels_(panels), blocks_(blocks_of<T>(layer.hidden)) {
    // Many rows make the weight gradients' loads and stores cheap; few stay in the L2 cache with them.
    const index bytes = weight_bytes(layer);
    rows_ = bytes <= l2_bytes ? 128 : bytes <= 4 * l2_bytes ? 256 : 512;
    if (rows_ < layer.batch) rows_ = layer.batch;
    if (rows_ > layer.steps * layer.batch) rows_ = layer.steps * layer.batch;
    const index padded = blocks_ * L, state = layer.batch * padded;
    for (int s = 0; s < Cell::stages; ++s) {
      dw_hh_[s] = arena.template take<T>(
          grads.w_hh.data ? padded * Cell::recurrent[s].width() * layer.hidden : 0);
      operand_[s] = arena.template take<T>(grads.w_hh.data ? rows_ * padded : 0);
    }
    dw_ih_ = arena.template take<T>(grads.w_ih.data ? padded * Cell::input.width() * layer.inputs : 0);
    db_ = arena.template take<T>(padded * Cell::gates);
    d_ = arena.template take<T>(rows_ * padded * Cell::gates);
    dh_ = arena.template take<T>(state);
    dc_ = arena.template take<T>(Cell::cell_state < 0 ? 0 : state);
    dq_ = arena.template take<T>(Cell::stages > 1 ? state : 0);
    c0_ = arena.template take<T>(Cell::cell_state < 0 ? 0 : state);
    state_ = {&layer_,     panels.zeros, c0_,
              layer.saved, saved_batch,  States<Cell, T>::chunk_steps(layer, saved_batch),
              true};
  }

  static index weight_bytes(const Layer<T>& layer) {
    return Cell::gates * layer.hidden * (layer.inputs + layer.hidden) * index{sizeof(T)};
  }

  BackwardLoop(const BackwardLoop&) = delete;  // it points to itself

  // The sums over all rows: [blocks][features][gates of the window][lanes]; db [blocks][gates][lanes].
  T* dw_ih() const { return dw_ih_; }
  T* dw_hh(int s) const { return dw_hh_[s]; }
  T* db() const { return db_; }

  // By all threads of the team, each with its rank.
  void run(const Team& team) {
    team_ = team;
    const Part part = part_of(layer_, team_, blocks_);
    prepare(part);
    wait(team_);
    if (layer_.batch == 0) {  // the weight gradients are zero
      weight_gradients({layer_.steps - 1, layer_.steps}, 0);
      wait(team_);
    }
    for (index t1 = layer_.batch > 0 ? layer_.steps : 0; t1 > 0;) {
      const Range steps = chunk_before(t1);
      const index rows = state_.before(t1) - state_.before(steps.begin);
      for (index t = t1 - 1; t >= steps.begin; --t) step(t, place(steps, t), part);
      wait(team_);
      if (grads_.x.data) input_gradients(steps, rows);
      weight_gradients(steps, rows);
      wait(team_);
      t1 = steps.begin;
    }
    if (grads_.h0.data)
      from_blocks(grads_.h0, dh_, layer_.batch, layer_.hidden, part.rows, part.blocks);
    if (grads_.c0.data)
      from_blocks(grads_.c0, dc_, layer_.batch, layer_.hidden, part.rows, part.blocks);
  }

 private:
  static constexpr int L = lanes<T>;
  static constexpr int last = Cell::stages - 1;

  // The chunk that ends at t1: as many steps as have at most rows_ rows together, and at least one.
  Range chunk_before(index t1) const {
    index t0 = t1 - 1;
    while (t0 > 0 && state_.before(t1) - state_.before(t0 - 1) <= rows_) --t0;
    return {t0, t1};
  }

  // The first row of a packed chunk in its sequences, and of step t in the chunk: in the order of
  // memory.
  index first_row_of(Range steps) const {
    const index a = layer_.packed.first[steps.begin], b = layer_.packed.first[steps.end - 1];
    return a < b ? a : b;
  }
  index place(Range steps, index t) const {
    if (layer_.packed.first) return layer_.packed.first[t] - first_row_of(steps);
    return (t - steps.begin) * layer_.batch;
  }

  T* d(index block, index row) const { return d_ + (block * rows_ + row) * Cell::gates * L; }

  void prepare(Part part) {
    to_blocks(dh_, grads_.h_n, layer_.batch, layer_.hidden, part.rows, part.blocks);
    if constexpr (Cell::cell_state >= 0) {
      to_blocks(dc_, grads_.c_n, layer_.batch, layer_.hidden, part.rows, part.blocks);
      to_blocks(c0_, layer_.c0, layer_.batch, layer_.hidden, part.rows, part.blocks);
    }
    if (team_.rank == 0) {
      for (index k = 0; k < blocks_ * Cell::gates * L; ++k) db_[k] = 0;
    }
  }

  // `row`: where the rows of step t begin in the chunk.
  void step(index t, index row, Part part) {
    const Range rows = present(part.rows, state_.count(t));
    apply_all<last>(t, row, rows, part.blocks);
    if constexpr (last > 0) {
      product<last>(row, rows, part.blocks, dq_);
      apply_all<last - 1>(t, row, rows, part.blocks);
      static_assert(last <= 1);
    }
    if (t > 0 || grads_.h0.data) product<0>(row, rows, part.blocks, dh_);
  }

  template <int s>
  void apply_all(index t, index place, Range rows, Range blocks) {
    const Slots<Cell, T> slots = state_.slots(t);
    for (index first = rows.begin; first < rows.end; first += group) {
      const index count = rows.end - first < group ? rows.end - first : group;
      const RowsOfStep<Cell, T, const T> step(state_, grads_.y, t, first, count);
      for (index block = blocks.begin; block < blocks.end; ++block) {
        const index at = (block * layer_.batch + first) * L, chunk_row = place + first;
        const bool keeps = grads_.w_hh.data != nullptr;
        const Local local{
            slots.at(block, first),
            d(block, chunk_row),
            dh_ + at,
            Cell::cell_state < 0 ? nullptr : dc_ + at,
            last > 0 ? dq_ + at : nullptr,
            keeps && s == 0 ? operand_[0] + chunk_row * blocks_ * L : nullptr,
            keeps && s == last && last > 0 ? operand_[last] + chunk_row * blocks_ * L : nullptr,
            blocks_ * L,
            block,
            layer_.hidden - block * L,
            grads_.y.data != nullptr};
        index row = 0;
        for (; row + 2 <= count; row += 2) apply<s, Pack<Vector<T>>>(step, local, row);
        for (; row < count; ++row) apply<s, Vector<T>>(step, local, row);
      }
    }
  }

  // What apply needs of this object, for one block: by value, since the compiler must assume that any
  // store of numbers changes the object.
  struct Local {
    const T* slots;
    T *d, *dh, *dc, *dq, *h_operand, *q_operand;
    index padded, block, units;
    bool has_dy;
  };

  // The cell's formula for one row, or for two (V a Pack).
  template <int s, class V>
  static RNNFAST_INLINE void apply(const RowsOfStep<Cell, T, const T>& step, const Local of,
                                   index row) {
    constexpr index d_size = Cell::gates * L, slot_size = Cell::slots * L;
    const index unit = of.block * L;
    const auto read = [&](const T* from, index size) {
      return gather<V>([&](int r) { return load(from + (row + r) * size); });
    };
    const auto write = [&](T* to, index size, V x) {
      scatter(x, [&](int r, Vector<T> part) { store(to + (row + r) * size, part); });
    };
    V v[Cell::slots], dv[Cell::gates];
#pragma GCC unroll 8
    for (int slot = 0; slot < Cell::slots; ++slot) v[slot] = read(of.slots + slot * L, slot_size);
    const V h = gather<V>([&](int r) { return load_some(step.h[row + r] + unit, of.units); });
    const V c =
        gather<V>([&](int r) { return load(step.c[row + r].data + of.block * step.c[row + r].block); });
    V dh = read(of.dh, L), dc = splat<V>(0), grad;
    if constexpr (Cell::cell_state >= 0) dc = read(of.dc, L);
    // Other threads may be reading the rest, which the last stage wrote.
    constexpr Window written = s == last ? Window{0, Cell::gates} : Cell::recurrent[s];
    if constexpr (s == last) {
      grad = dh;
      if (of.has_dy)
        grad = grad + gather<V>([&](int r) { return load_some(step.y[row + r] + unit, of.units); });
#pragma GCC unroll 8
      for (int slot = 0; slot < Cell::gates; ++slot) dv[slot] = splat<V>(0);
    } else {
      grad = read(of.dq, L);
#pragma GCC unroll 8
      for (int slot = written.begin; slot < written.end; ++slot)
        dv[slot] = read(of.d + slot * L, d_size);
    }
    if (of.h_operand) write(of.h_operand + unit, of.padded, h);
    if constexpr (s == last && last > 0)
      if (of.q_operand) write(of.q_operand + unit, of.padded, Cell::operand(v, h));
    Cell::template backward<s>(v, h, c, grad, dv, dh, dc);
    write(of.dh, L, dh);
    if constexpr (Cell::cell_state >= 0) write(of.dc, L, dc);
#pragma GCC unroll 8
    for (int slot = written.begin; slot < written.end; ++slot)
      scatter(dv[slot], [&](int r, Vector<T> x) {
        // Padding must stay zero: an infinite input would make it NaN, and the products spread it.
        store(of.d + (row + r) * d_size + slot * L, of.units < L ? first_lanes<T>(x, of.units) : x);
      });
  }

  // to += the gradients of stage s's gates times its weights; a stage after the first starts from zero.
  template <int s>
  void product(index first, Range rows, Range blocks, T* to) {
    constexpr Window window = Cell::recurrent[s];
    if (team_.split == Split::units) wait(team_);
    const Panels<T> panels{panels_.stage[s], panels_.stage_size(s, blocks_), L};
    const Depth depth{blocks_, rows_ * Cell::gates * L, window.width() * L, 1};
    for_each_tile<T, 1>(rows.size(), blocks, [&](index row, int R, index block, int, auto tile) {
      const T* a[accumulators];
      T* c[accumulators];
      for (int r = 0; r < R; ++r) {
        const index b = rows.begin + row + r;
        a[r] = d(0, first + b) + window.begin * L;
        c[r] = to + (block * layer_.batch + b) * L;
      }
      tile(a, depth, panels.from(block), c, layer_.batch * L, s == 0 ? nullptr : panels_.zeros, 0);
    });
  }

  void input_gradients(Range steps, index all_rows) {
    const Range rows = share(all_rows, team_.size, team_.rank);
    const Panels<T> panels{panels_.input, panels_.input_size(blocks_), L};
    const Depth depth{blocks_, rows_ * Cell::gates * L, Cell::input.width() * L, 1};
    const Range columns{0, blocks_of<T>(layer_.inputs)};
    for_each_tile<T, 1>(rows.size(), columns, [&](index row, int R, index block, int N, auto tile) {
      const T* a[accumulators];
      T* c[accumulators];
      alignas(64) T result[accumulators * L];
      for (int r = 0; r < R; ++r) {
        a[r] = d(0, rows.begin + row + r) + Cell::input.begin * L;
        c[r] = result + r * N * L;
      }
      tile(a, depth, panels.from(block), c, L, panels_.zeros, 0);
      for (int r = 0; r < R; ++r) {
        T* to = input_gradient_row(steps, rows.begin + row + r) + block * L;
        for (int n = 0; n < N; ++n, to += L) {
          const index count = layer_.inputs - (block + n) * L;
          Vector<T> v = load(c[r] + n * L);
          if (grads_.x_accumulate) v += load_some(static_cast<const T*>(to), count);
          store_some(to, v, count);
        }
      }
    });
  }

  T* input_gradient_row(Range steps, index row) const {
    if (layer_.packed.first) return grads_.x.data + (first_row_of(steps) + row) * grads_.x.row;
    return state_.row(grads_.x, steps.begin + row / layer_.batch, row % layer_.batch);
  }

  void weight_gradients(Range steps, index rows) {
    const index padded = blocks_ * L;
    const bool first = steps.end == layer_.steps;
    if (grads_.w_ih.data) {
      constexpr Window window = Cell::input;
      if (layer_.packed.first)
        accumulate<window.begin, window.width()>(dw_ih_, layer_.inputs, first,
                                                 layer_.x.data + first_row_of(steps) * layer_.x.row,
                                                 {1, 0, rows, layer_.x.row});
      else
        accumulate<window.begin, window.width()>(dw_ih_, layer_.inputs, first,
                                                 state_.row(layer_.x, steps.begin, 0),
                                                 over(steps.size(), layer_.x.step, layer_.x.row));
    }
    if (grads_.w_hh.data) {
      constexpr Window h = Cell::recurrent[0];
      accumulate<h.begin, h.width()>(dw_hh_[0], layer_.hidden, first, operand_[0],
                                     {1, 0, rows, padded});
      if constexpr (last > 0) {
        constexpr Window q = Cell::recurrent[last];
        accumulate<q.begin, q.width()>(dw_hh_[last], layer_.hidden, first, operand_[last],
                                       {1, 0, rows, padded});
      }
    }
    if (grads_.b_ih || grads_.b_hh) {
      const Range blocks = share(blocks_, team_.size, team_.rank);
      for (index block = blocks.begin; block < blocks.end; ++block)
        sum_rows(db_ + block * Cell::gates * L, d(block, 0), rows);
    }
  }

  // to += the sum of all rows, in slices as in the products; all gates at once.
  static void sum_rows(T* to, const T* from, index rows) {
    for (index r = 0; r < rows;) {
      const index end = r + slice < rows ? r + slice : rows;
      Vector<T> sum[Cell::gates] = {};
      for (; r < end; ++r)
#pragma GCC unroll 8
        for (int slot = 0; slot < Cell::gates; ++slot)
          sum[slot] += load(from + (r * Cell::gates + slot) * L);
#pragma GCC unroll 8
      for (int slot = 0; slot < Cell::gates; ++slot)
        store(to + slot * L, load(static_cast<const T*>(to) + slot * L) + sum[slot]);
    }
  }

  Depth over(index steps, index step, index row) const {
    return layer_.batch == 1 ? Depth{1, 0, steps, step} : Depth{steps, step, layer_.batch, row};
  }

  // to[block][feature][P][lanes] += the sum over the rows k of the chunk of features[k] * d[k].
  template <int begin, int P>
  void accumulate(T* to, index features, bool first, const T* from, Depth depth) {
    const Panels<T> panels{d_ + begin * L, rows_ * Cell::gates * L, Cell::gates * L};
    const bool by_blocks = blocks_ >= 4 * team_.size || blocks_ % team_.size == 0;
    const Range blocks = by_blocks ? share(blocks_, team_.size, team_.rank) : Range{0, blocks_};
    const Range own = by_blocks ? Range{0, features} : share(features, team_.size, team_.rank);
    for_each_tile<T, P>(own.size(), blocks, [&](index row, int R, index block, int, auto tile) {
      const T* a[accumulators];
      T* c[accumulators];
      for (int r = 0; r < R; ++r) {
        a[r] = from + own.begin + row + r;
        c[r] = to + (block * features + own.begin + row + r) * P * L;
      }
      tile(a, depth, panels.from(block), c, features * P * L, first ? panels_.zeros : nullptr, 0);
    });
  }

  Layer<T> layer_;
  Gradients<T> grads_;
  BackwardPanels<Cell, T> panels_;
  Team team_;
  index blocks_;
  index rows_;                       // the most that a chunk has
  T *dw_ih_, *dw_hh_[Cell::stages];  // [blocks][features][gates of the window][lanes]
  T *db_, *d_;                       // [blocks][gates][lanes]; see above
  T *dh_, *dc_, *dq_;                // [blocks][B][lanes]; dq_: of a second stage's operand
  T* operand_[Cell::stages];         // [rows of the chunk][blocks][lanes]
  T* c0_;
  States<Cell, T> state_;
};

}  // namespace rnnfast::RNNFAST_TARGET
