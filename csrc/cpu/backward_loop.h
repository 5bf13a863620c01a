// The reversed time loop over any cell, for the rows of a batch that belong together, and the gradients
// of inputs and weights.
//
// A chunk of steps at a time, latest first: the loop leaves the gradients of the chunk's
// pre-activations in d, [blocks][rows of the chunk][gates][lanes]. Read along its rows d is the left
// side of the products that give the gradients of states and inputs; read down its rows each block is a
// panel, and the weight gradients are "features times panel", the features being x, h or what a second
// product multiplied. Where h is a projection, p holds the gradients of its outputs in the same way.
// Sums over time and batch run in one fixed order, the latest chunk first, whatever the threads.
#pragma once

#include "states.h"

namespace rnnfast::RNNFAST_TARGET {

// The weights, packed for products with the gradients of gates.
template <class Cell, class T>
struct BackwardPanels {
  T *stage[Cell::stages], *input, *projection;  // [blocks of columns][block, gate, lane][lanes]
  T* zeros;                                     // zeros_of(layer)

  // One panel, for gradients of `blocks` blocks with `gates` gates each.
  static constexpr index size(index blocks, int gates) { return blocks * gates * lanes<T> * lanes<T>; }
};

inline constexpr index l2_bytes = 640 * 1024;  // what the gradients of the weights may have of it

template <class Cell, class T>
class BackwardLoop {
 public:
  // `saved_batch`: the rows of a step in layer.saved. From a null arena it only counts its memory.
  BackwardLoop(const Layer<T>& layer, const Gradients<T>& grads, index saved_batch,
               const BackwardPanels<Cell, T>& panels, Arena& arena)
      : layer_(layer),
        grads_(grads),
        panels_(panels),
        blocks_(blocks_of<T>(layer.hidden)),
        outputs_(blocks_of<T>(layer.outputs)) {
    // Many rows make the weight gradients' loads and stores cheap; few stay in the L2 cache with them.
    const index bytes = weight_bytes(layer);
    rows_ = bytes <= l2_bytes ? 128 : bytes <= 4 * l2_bytes ? 256 : 512;
    if (rows_ < layer.batch) rows_ = layer.batch;
    if (rows_ > layer.steps * layer.batch) rows_ = layer.steps * layer.batch;
    const index padded = blocks_ * L, state = layer.batch * padded;
    for (int s = 0; s < Cell::stages; ++s)
      dw_hh_[s] = arena.template take<T>(
          grads.w_hh.data ? padded * Cell::recurrent[s].width() * operand_width(layer, s) : 0);
    dw_hr_ = arena.template take<T>(grads.w_hr.data ? outputs_ * L * layer.hidden : 0);
    const bool multiplied = (Cell::stages > 1 && grads.w_hh.data) || grads.w_hr.data;
    operand_ = arena.template take<T>(multiplied ? rows_ * padded : 0);
    h_ = arena.template take<T>(grads.w_hh.data && layer.packed.count ? rows_ * layer.outputs : 0);
    dw_ih_ = arena.template take<T>(grads.w_ih.data ? padded * Cell::input.width() * layer.inputs : 0);
    db_ = arena.template take<T>(padded * Cell::gates);
    d_ = arena.template take<T>(rows_ * padded * Cell::gates);
    p_ = arena.template take<T>(is_projected<Cell>(layer_) ? rows_ * outputs_ * L : 0);
    dh_ = arena.template take<T>(layer.batch * outputs_ * L);
    dc_ = arena.template take<T>(Cell::cell_state < 0 ? 0 : state);
    dq_ = arena.template take<T>(Cell::stages > 1 || is_projected<Cell>(layer_) ? state : 0);
    c0_ = arena.template take<T>(Cell::cell_state < 0 ? 0 : state);
    state_ = {&layer_,     panels.zeros, c0_,
              layer.saved, saved_batch,  States<Cell, T>::chunk_steps(layer, saved_batch),
              true};
  }

  static index weight_bytes(const Layer<T>& layer) {
    return Cell::gates * layer.hidden * (layer.inputs + layer.outputs) * index{sizeof(T)};
  }

  BackwardLoop(const BackwardLoop&) = delete;  // it points to itself

  // The sums over all rows: [blocks][features][gates of the window][lanes]; db [blocks][gates][lanes].
  T* dw_ih() const { return dw_ih_; }
  T* dw_hh(int s) const { return dw_hh_[s]; }
  T* dw_hr() const { return dw_hr_; }
  T* db() const { return db_; }

  // By all threads of the team, each with its rank.
  void run(const Team& team) {
    team_ = team;
    const Part part = part_of(layer_, team_);
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
      if (h_) gather_h(steps, part);
      wait(team_);
      if (grads_.x.data) input_gradients(steps, rows);
      weight_gradients(steps, rows);
      wait(team_);
      t1 = steps.begin;
    }
    if (grads_.h0.data)
      from_blocks(grads_.h0, dh_, layer_.batch, layer_.outputs, part.rows, part.outputs);
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
    to_blocks(dh_, grads_.h_n, layer_.batch, layer_.outputs, part.rows, part.outputs);
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
    if (is_projected<Cell>(layer_)) {
      output_gradients(t, row, rows, part.outputs);
      product(p_ + row * L, rows_ * L, outputs_, Plain::all, panels_.projection, t, rows, part.blocks,
              dq_, true);
    }
    apply_all<last>(t, row, rows, part.blocks);
    if constexpr (last > 0) {
      gate_product<last>(t, row, rows, part.blocks, dq_, true);
      apply_all<last - 1>(t, row, rows, part.blocks);
      static_assert(last <= 1);
    }
    if (t > 0 || grads_.h0.data)
      gate_product<0>(t, row, rows, part.outputs, dh_, is_projected<Cell>(layer_));
  }

  // The gradients of the step's projected outputs.
  void output_gradients(index t, index place, Range rows, Range blocks) {
    for (index b = rows.begin; b < rows.end; ++b) {
      const T* dy = grads_.y.data ? state_.row(grads_.y, t, b) : nullptr;
      for (index block = blocks.begin; block < blocks.end; ++block) {
        const index left = layer_.outputs - block * L;
        Vector<T> v = load(static_cast<const T*>(dh_) + (block * layer_.batch + b) * L);
        if (dy) v += load_some(dy + block * L, left);
        store(p_ + (block * rows_ + place + b) * L, left < L ? first_lanes<T>(v, left) : v);
      }
    }
  }

  template <int s>
  void apply_all(index t, index place, Range rows, Range blocks) {
    const Slots<Cell, T> slots = state_.slots(t);
    for (index first = rows.begin; first < rows.end; first += group) {
      const index count = rows.end - first < group ? rows.end - first : group;
      const RowsOfStep<Cell, T, const T> step(state_, grads_.y, t, first, count);
      for (index block = blocks.begin; block < blocks.end; ++block) {
        const index at = (block * layer_.batch + first) * L, chunk_row = place + first;
        const Local local{slots.at(block, first),
                          d(block, chunk_row),
                          dh_ + at,
                          Cell::cell_state < 0 ? nullptr : dc_ + at,
                          dq_ ? dq_ + at : nullptr,
                          operand_ ? operand_ + chunk_row * blocks_ * L : nullptr,
                          blocks_ * L,
                          block,
                          layer_.hidden - block * L,
                          grads_.y.data != nullptr,
                          is_projected<Cell>(layer_)};
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
    T *d, *dh, *dc, *dq, *operand;
    index padded, block, units;
    bool has_dy, is_projected;
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
    V h = splat<V>(0);
    if constexpr (!Cell::projects)
      h = gather<V>([&](int r) { return load_some(step.h[row + r] + unit, of.units); });
    const V c =
        gather<V>([&](int r) { return load(step.c[row + r].data + of.block * step.c[row + r].block); });
    const bool whole = !(Cell::projects && of.is_projected);  // dh has the width of the cell
    V dh = splat<V>(0), dc = splat<V>(0), grad;
    if (whole) dh = read(of.dh, L);
    if constexpr (Cell::cell_state >= 0) dc = read(of.dc, L);
    // Other threads may be reading the rest, which the last stage wrote.
    constexpr Window written = s == last ? Window{0, Cell::gates} : Cell::recurrent[s];
    if constexpr (s == last) {
      grad = whole ? dh : read(of.dq, L);
      if (whole && of.has_dy)
        grad = grad + gather<V>([&](int r) { return load_some(step.y[row + r] + unit, of.units); });
      dh = splat<V>(0);
#pragma GCC unroll 8
      for (int slot = 0; slot < Cell::gates; ++slot) dv[slot] = splat<V>(0);
    } else {
      grad = read(of.dq, L);
#pragma GCC unroll 8
      for (int slot = written.begin; slot < written.end; ++slot)
        dv[slot] = read(of.d + slot * L, d_size);
    }
    if constexpr (s == last && (last > 0 || Cell::projects))
      if (of.operand) write(of.operand + unit, of.padded, Cell::operand(v, h));
    Cell::template backward<s>(v, h, c, grad, dv, dh, dc);
    if (whole) write(of.dh, L, dh);
    if constexpr (Cell::cell_state >= 0) write(of.dc, L, dc);
#pragma GCC unroll 8
    for (int slot = written.begin; slot < written.end; ++slot)
      scatter(dv[slot], [&](int r, Vector<T> x) {
        // Padding must stay zero: an infinite input would make it NaN, and the products spread it.
        store(of.d + (row + r) * d_size + slot * L, of.units < L ? first_lanes<T>(x, of.units) : x);
      });
  }

  // The gradients of stage s's gates times its weights.
  template <int s>
  void gate_product(index t, index first, Range rows, Range blocks, T* to, bool from_zero) {
    product(d(0, first), rows_ * Cell::gates * L, blocks_, Cell::recurrent[s], panels_.stage[s], t,
            rows, blocks, to, from_zero);
  }

  // to = or += gradients times weights. The gradients: `count` blocks, block_stride apart, of rows of
  // as many slots as a row has.
  void product(const T* from, index block_stride, index count, Window window, const T* weights, index t,
               Range rows, Range blocks, T* to, bool from_zero) {
    if (team_.split == Split::units) wait(team_);
    const index row_size = block_stride / rows_;
    const index panel = panels_.size(count, window.width());
    const Extent extent{{count, block_stride, window.width() * L, 1}, panel, L, layer_.batch * L, 0};
    for_each_tile<T, 1>(
        rows.size(), blocks, t % 2 == 1, [&](index row, int R, index block, int, auto tile) {
          const T* a[accumulators];
          T* c[accumulators];
          for (int r = 0; r < R; ++r) {
            const index b = rows.begin + row + r;
            a[r] = from + b * row_size + window.begin * L;
            c[r] = to + (block * layer_.batch + b) * L;
          }
          tile(a, weights + block * panel, c, from_zero ? panels_.zeros : nullptr, extent);
        });
  }

  void input_gradients(Range steps, index all_rows) {
    const Range rows = share(all_rows, team_.size, team_.rank);
    const index panel = panels_.size(blocks_, Cell::input.width());
    const Extent extent{{blocks_, rows_ * Cell::gates * L, Cell::input.width() * L, 1}, panel, L, L, 0};
    const Range columns{0, blocks_of<T>(layer_.inputs)};
    for_each_tile<T, 1>(rows.size(), columns, false,
                        [&](index row, int R, index block, int N, auto tile) {
                          const T* a[accumulators];
                          T* c[accumulators];
                          alignas(64) T result[accumulators * L];
                          for (int r = 0; r < R; ++r) {
                            a[r] = d(0, rows.begin + row + r) + Cell::input.begin * L;
                            c[r] = result + r * N * L;
                          }
                          tile(a, panels_.input + block * panel, c, panels_.zeros, extent);
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

  // h before each row of a packed chunk, in the order of d: its rows do not follow one another in y.
  void gather_h(Range steps, Part part) {
    for (index t = steps.begin; t < steps.end; ++t) {
      const Range rows =
          present(team_.split == Split::units ? share(layer_.batch, team_.size, team_.rank) : part.rows,
                  state_.count(t));
      for (index b = rows.begin; b < rows.end; ++b)
        __builtin_memcpy(h_ + (place(steps, t) + b) * layer_.outputs, state_.h(t, b),
                         static_cast<std::size_t>(layer_.outputs) * sizeof(T));
    }
  }

  void weight_gradients(Range steps, index rows) {
    const bool first = steps.end == layer_.steps;
    const bool packed = layer_.packed.first != nullptr;
    if (grads_.w_ih.data) {
      constexpr Window window = Cell::input;
      const T* x = packed ? layer_.x.data + first_row_of(steps) * layer_.x.row
                          : state_.row(layer_.x, steps.begin, 0);
      accumulate<window.width()>(
          dw_ih_, layer_.inputs, first, x,
          packed ? Depth{1, 0, rows, layer_.x.row} : over(steps.size(), layer_.x.step, layer_.x.row),
          gates_from(window.begin, 0), blocks_);
    }
    if (grads_.w_hh.data) {
      constexpr Window window = Cell::recurrent[0];
      const auto times = [&](bool starts, const T* h, Depth depth, index row) {
        accumulate<window.width()>(dw_hh_[0], layer_.outputs, starts, h, depth,
                                   gates_from(window.begin, row), blocks_);
      };
      if (packed) {
        times(first, h_, {1, 0, rows, layer_.outputs}, 0);
      } else {
        const index begin = steps.begin > 0 ? steps.begin : 1;
        if (begin < steps.end)
          times(first, state_.row(layer_.y, begin - 1, 0),
                over(steps.end - begin, layer_.y.step, layer_.y.row),
                (begin - steps.begin) * layer_.batch);
        if (steps.begin == 0)
          times(first && begin >= steps.end, state_.h(0, 0),
                {1, 0, layer_.batch, layer_.h0.data ? layer_.h0.row : 0}, 0);
      }
      if constexpr (last > 0) {
        constexpr Window late = Cell::recurrent[last];
        accumulate<late.width()>(dw_hh_[last], layer_.hidden, first, operand_,
                                 {1, 0, rows, blocks_ * L}, gates_from(late.begin, 0), blocks_);
      }
    }
    if (grads_.w_hr.data)
      accumulate<1>(dw_hr_, layer_.hidden, first, operand_, {1, 0, rows, blocks_ * L},
                    {p_, rows_ * L, L}, outputs_);
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

  // The gradients of the gates from `slot` on as panels, without the chunk's first `row` rows.
  Panels<T> gates_from(int slot, index row) const {
    return {d(0, row) + slot * L, rows_ * Cell::gates * L, Cell::gates * L};
  }

  // to[block][feature][P][lanes] += the sum over the rows k of features[k] * panels[k].
  template <int P>
  void accumulate(T* to, index features, bool first, const T* from, Depth depth, Panels<T> panels,
                  index all_blocks) {
    const bool by_blocks = all_blocks >= 4 * team_.size || all_blocks % team_.size == 0;
    const Range blocks = by_blocks ? share(all_blocks, team_.size, team_.rank) : Range{0, all_blocks};
    const Range own = by_blocks ? Range{0, features} : share(features, team_.size, team_.rank);
    // A tile cuts its sum into slices between steps, or within one: many rows are a sum of their own.
    const index sums = depth.inner > slice ? depth.outer : 1;
    const Depth each{depth.outer / sums, depth.outer_stride, depth.inner, depth.inner_stride};
    const Extent extent{each, panels.panel, panels.step, features * P * L, 0};
    for_each_tile<T, P>(own.size(), blocks, false, [&](index row, int R, index block, int, auto tile) {
      const T* a[accumulators];
      T* c[accumulators];
      for (int r = 0; r < R; ++r) {
        a[r] = from + own.begin + row + r;
        c[r] = to + (block * features + own.begin + row + r) * P * L;
      }
      const T* b = panels.data + block * panels.panel;
      for (index n = 0; n < sums; ++n, b += depth.inner * panels.step) {
        tile(a, b, c, first && n == 0 ? panels_.zeros : nullptr, extent);
        for (int r = 0; r < R; ++r) a[r] += depth.outer_stride;
      }
    });
  }

  Layer<T> layer_;
  Gradients<T> grads_;
  BackwardPanels<Cell, T> panels_;
  Team team_;
  index blocks_, outputs_;                    // of the hidden units, and of h
  index rows_;                                // the most that a chunk has
  T *dw_ih_, *dw_hh_[Cell::stages], *dw_hr_;  // [blocks][features][gates of the window][lanes]
  T *db_, *d_, *p_;                           // [blocks][gates][lanes]; see above
  T *dh_, *dc_, *dq_;  // [blocks][B][lanes]; dq_: of what a second product multiplied
  T* operand_;         // [rows of the chunk][blocks][lanes], what that was
  T* h_;               // [rows of a packed chunk][R]
  T* c0_;
  States<Cell, T> state_;
};

}  // namespace rnnfast::RNNFAST_TARGET
