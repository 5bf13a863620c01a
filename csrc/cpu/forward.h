// The time loop over any cell, forward.
//
// A chunk of steps at a time: the input products of the chunk go straight into the slots of its steps,
// then each step adds its recurrent products to them and applies the cell's formula, tile by tile.
// Every pre-activation is bias, then input products, then recurrent products, each in the order of k.
#pragma once

#include "states.h"
#include "unpacked.h"

namespace rnnfast::RNNFAST_TARGET {

template <class Cell, class T>
class Forward {
 public:
  // From a null base it only counts the scratch memory.
  Forward(const Layer<T>& layer, const Team& team, void* base)
      : layer_(layer), team_(team), blocks_(blocks_of<T>(layer.hidden)) {
    state_.chunk = States<Cell, T>::chunk_steps(layer, layer.batch);
    Arena arena(base);
    const index padded = blocks_ * L;
    input_panels_ = arena.template take<T>(padded * Cell::input.width() * layer.inputs);
    for (int s = 0; s < Cell::stages; ++s)
      stage_panels_[s] = arena.template take<T>(padded * Cell::recurrent[s].width() * layer.hidden);
    bias_ = arena.template take<T>(padded * Cell::gates);
    operand_ = arena.template take<T>(Cell::stages > 1 ? layer.batch * padded : 0);
    c0_ = arena.template take<T>(Cell::cell_state < 0 ? 0 : layer.batch * padded);
    zeros_ = arena.template take<T>(padded);
    state_ = {&layer_, zeros_, c0_, layer.saved, layer.batch, state_.chunk, layer.saved != nullptr};
    if (!layer.saved)
      state_.memory =
          arena.template take<T>(2 * state_.chunk * layer.batch * saved_row<Cell, T>(layer.hidden));
    scratch_ = arena.used();
  }

  index scratch() const { return scratch_; }

  void run() {
    const FlushDenormals guard;
    if (layer_.batch == 0) return;
    const Part part = part_of(layer_, team_, blocks_);
    prepare(part);
    wait(team_);
    for (index t0 = 0; t0 < layer_.steps; t0 += state_.chunk) {
      const index t1 = t0 + state_.chunk < layer_.steps ? t0 + state_.chunk : layer_.steps;
      project_inputs({t0, t1}, part);
      for (index t = t0; t < t1; ++t) {
        stage<0>(t, part);
        if constexpr (Cell::stages > 1) stage<1>(t, part);
        static_assert(Cell::stages <= 2);
        if (t + 1 == layer_.steps || state_.count(t + 1) < state_.count(t)) write_final_states(t, part);
      }
    }
  }

 private:
  static constexpr int L = lanes<T>;

  void prepare(Part part) {
    // Each thread prepares some blocks: its own ones where it alone needs them.
    const Range blocks = share(blocks_, team_.size, team_.rank);
    if (inputs_use() == Use::packed)
      pack(Cell::input, layer_.w_ih, layer_.inputs, blocks, input_panels_);
    for (int s = 0; s < Cell::stages && stages_use() == Use::packed; ++s)
      pack(Cell::recurrent[s], layer_.w_hh, layer_.hidden, blocks, stage_panels_[s]);
    for (index block = blocks.begin; block < blocks.end; ++block) sum_biases(block);
    if constexpr (Cell::cell_state >= 0)
      to_blocks(c0_, layer_.c0, layer_.batch, layer_.hidden, part.rows, part.blocks);
    if (team_.rank == 0)
      for (index k = 0; k < blocks_ * L; ++k) zeros_[k] = 0;
  }

  // Weights that are read once are not worth a packed copy of them all. Streamed: a few blocks at a
  // time are packed, used while they are in the cache, and overwritten by the next. Unpacked: not even
  // that, for a few rows and a single step.
  enum class Use { packed, streamed, unpacked };

  Use use(bool once) const {
    if (layer_.steps == 1 && layer_.batch <= most_unpacked_rows) return Use::unpacked;
    const bool own_blocks = team_.split == Split::units || team_.size == 1;
    return once && own_blocks ? Use::streamed : Use::packed;
  }
  Use inputs_use() const { return use(state_.chunk == layer_.steps); }
  Use stages_use() const { return use(layer_.steps == 1); }

  void pack(Window window, Matrix<const T> w, index depth, Range blocks, T* panels) const {
    for (index block = blocks.begin; block < blocks.end; ++block)
      pack_forward<Cell>(panels + block * window.width() * L * depth, w, layer_.hidden, depth, window,
                         block * L, units(block));
  }

  index units(index block) const {
    const index left = layer_.hidden - block * L;
    return left < L ? left : L;
  }

  void sum_biases(index block) {
    for (int slot = 0; slot < Cell::gates; ++slot) {
      const index offset = Cell::weight_block[slot] * layer_.hidden + block * L;
      bool recurrent = false;
      for (Window w : Cell::recurrent) recurrent = recurrent || w.has(slot);
      Vector<T> sum{};
      if (layer_.b_ih && Cell::input.has(slot)) sum += load_some(layer_.b_ih + offset, units(block));
      if (layer_.b_hh && recurrent) sum += load_some(layer_.b_hh + offset, units(block));
      store(bias_ + (block * Cell::gates + slot) * L, sum);
    }
  }

  // for_each_tile, or where weights are not packed at all the like with tiles of one block.
  template <int P, class F>
  void for_tiles(Use weights, Window window, Matrix<const T> w, index rows, Range blocks, F f) {
    if (weights != Use::unpacked) {
      for_each_tile<T, P>(rows, blocks,
                          [&](index row, int R, index block, int N, TileFunction<T> tile) {
                            f(row, R, block, N, Tile<Cell, T, P>{tile, R, w, layer_.hidden, 0, 0});
                          });
    } else if (rows > 0) {
      const int R = static_cast<int>(rows);
      for (index block = blocks.begin; block < blocks.end; ++block)
        f(0, R, block, 1, Tile<Cell, T, P>{nullptr, R, w, layer_.hidden, block * L, window.begin});
    }
  }

  // Calls f(blocks, panels) for the packed panels of the thread's blocks: once for all of them, or
  // where the weights are streamed for a few at a time, packed just before.
  template <int P, class F>
  void for_panels(Use weights, Window window, Matrix<const T> w, index depth, T* to, Range blocks,
                  F f) {
    const Panels<T> all{to, P * L * depth, P * L};
    if (weights != Use::streamed) return f(blocks, all);
    for (index block = blocks.begin; block < blocks.end; block += most_panels<P>) {
      const index end = block + most_panels<P>;
      const Range few{block, end < blocks.end ? end : blocks.end};
      T* reused = to - (block - blocks.begin) * all.panel;
      pack(window, w, depth, few, reused);
      f(few, Panels<T>{reused, all.panel, all.step});
    }
  }

  void project_inputs(Range steps, Part part) {
    constexpr int P = Cell::input.width();
    const index block_stride = state_.slots(steps.begin).block;
    for_panels<P>(
        inputs_use(), Cell::input, layer_.w_ih, layer_.inputs, input_panels_, part.blocks,
        [&](Range blocks, Panels<T> panels) {
          const T* x[group];
          T* slots[group];
          index rows = 0;
          const auto project = [&] {
            for_tiles<P>(inputs_use(), Cell::input, layer_.w_ih, rows, blocks,
                         [&](index row, int R, index block, int N, const Tile<Cell, T, P>& tile) {
                           T* c[accumulators];
                           for (int r = 0; r < R; ++r) c[r] = slots[row + r] + block * block_stride;
                           start_from_bias(c, R, block_stride, block, N);
                           for (int r = 0; r < R; ++r) c[r] += Cell::input.begin * L;
                           tile(x + row, contiguous(layer_.inputs), panels.from(block), c, block_stride,
                                bias_ + (block * Cell::gates + Cell::input.begin) * L, Cell::gates * L);
                         });
            rows = 0;
          };
          for (index t = steps.begin; t < steps.end; ++t) {
            const Slots<Cell, T> step = state_.slots(t);
            const Range there = present(part.rows, state_.count(t));
            for (index b = there.begin; b < there.end; ++b) {
              x[rows] = state_.row(layer_.x, t, b);
              slots[rows] = step.at(0, b);
              if (++rows == group) project();
            }
          }
          project();
        });
  }

  // Gates that the input does not feed.
  void start_from_bias(T* const* slots, int R, index block_stride, index block, int N) {
    for (int slot = 0; slot < Cell::gates; ++slot)
      if (!Cell::input.has(slot))
        for (int n = 0; n < N; ++n)
          for (int r = 0; r < R; ++r)
            store(slots[r] + n * block_stride + slot * L,
                  load(static_cast<const T*>(bias_) + ((block + n) * Cell::gates + slot) * L));
  }

  template <int s>
  void stage(index t, Part part) {
    constexpr Window window = Cell::recurrent[s];
    constexpr int P = window.width();
    if (team_.split == Split::units && (t > 0 || s > 0)) wait(team_);
    const index padded = blocks_ * L;
    const Slots<Cell, T> slots = state_.slots(t);
    const Range there = present(part.rows, state_.count(t));
    for (index first = there.begin; first < there.end; first += group) {
      const index rows = there.end - first < group ? there.end - first : group;
      const RowsOfStep<Cell, T, T> step(state_, layer_.y, t, first, rows);
      const T* a[group];
      for (index r = 0; r < rows; ++r) a[r] = s == 0 ? step.h[r] : operand_ + (first + r) * padded;
      for_panels<P>(stages_use(), window, layer_.w_hh, layer_.hidden, stage_panels_[s], part.blocks,
                    [&](Range blocks, Panels<T> panels) {
                      for_tiles<P>(
                          stages_use(), window, layer_.w_hh, rows, blocks,
                          [&](index row, int R, index block, int N, const Tile<Cell, T, P>& tile) {
                            T* c[accumulators];
                            for (int r = 0; r < R; ++r)
                              c[r] = slots.at(block, first + row + r) + window.begin * L;
                            tile(a + row, contiguous(layer_.hidden), panels.from(block), c, slots.block,
                                 nullptr, 0);
                            for (int n = 0; n < N; ++n)
                              apply_to<s>(step, slots, block + n, first, row, row + R);
                          });
                    });
    }
  }

  // The cell's formula for one block of rows [begin, end) of the group of rows from `first`.
  template <int s>
  void apply_to(const RowsOfStep<Cell, T, T>& step, Slots<Cell, T> slots, index block, index first,
                index begin, index end) {
    const index units = layer_.hidden - block * L;
    T* const operand = operand_ ? operand_ + first * blocks_ * L : nullptr;
    const index padded = blocks_ * L;
    T* const own = slots.at(block, first);
    index row = begin;
    for (; row + 2 <= end; row += 2)
      apply<s, Pack<Vector<T>>>(step, own, operand, padded, block, units, row);
    for (; row < end; ++row) apply<s, Vector<T>>(step, own, operand, padded, block, units, row);
  }

  // For one row, or for two (V a Pack).
  template <int s, class V>
  static RNNFAST_INLINE void apply(const RowsOfStep<Cell, T, T>& step, T* own, T* operand, index padded,
                                   index block, index units, index row) {
    constexpr index size = Cell::slots * L;
    const index unit = block * L;
    V v[Cell::slots];
#pragma GCC unroll 8
    for (int slot = 0; slot < Cell::gates; ++slot)
      v[slot] = gather<V>(
          [&](int r) { return load(static_cast<const T*>(own) + (row + r) * size + slot * L); });
    const V h = gather<V>([&](int r) { return load_some(step.h[row + r] + unit, units); });
    const V c =
        gather<V>([&](int r) { return load(step.c[row + r].data + block * step.c[row + r].block); });
    const V out = Cell::template forward<s>(v, h, c);
#pragma GCC unroll 8
    for (int slot = 0; slot < Cell::slots; ++slot)
      scatter(v[slot], [&](int r, Vector<T> x) { store(own + (row + r) * size + slot * L, x); });
    scatter(out, [&](int r, Vector<T> x) {
      if constexpr (s + 1 < Cell::stages)
        store(operand + (row + r) * padded + unit, x);
      else
        store_some(step.y[row + r] + unit, x, units);
    });
  }

  // From the last step that each row has; a row that inference no longer holds was written then.
  void write_final_states(index t, Part part) {
    const Range left = present(part.rows, t + 1 < layer_.steps ? state_.count(t + 1) : 0);
    const Range there = present(part.rows, state_.count(t));
    const Slots<Cell, T> slots = state_.slots(t);
    for (index b = left.end > there.begin ? left.end : there.begin; b < there.end; ++b)
      for (index block = part.blocks.begin; block < part.blocks.end; ++block) {
        const index unit = block * L, left_units = layer_.hidden - unit;
        if (layer_.h_n.data)
          store_some(layer_.h_n.data + b * layer_.h_n.row + unit,
                     load_some(static_cast<const T*>(state_.row(layer_.y, t, b)) + unit, left_units),
                     left_units);
        if (layer_.c_n.data)
          store_some(layer_.c_n.data + b * layer_.c_n.row + unit,
                     load(slots.at(block, b) + Cell::cell_state * L), left_units);
      }
  }

  const Layer<T> layer_;
  const Team team_;
  const index blocks_;
  index scratch_;
  T *input_panels_, *stage_panels_[Cell::stages];  // [blocks][k][gates of the window][lanes]
  T* bias_;                                        // [blocks][gates][lanes]
  T* operand_;                                     // [B][blocks][lanes], what a second stage multiplies
  T *c0_, *zeros_;
  States<Cell, T> state_;
};

}  // namespace rnnfast::RNNFAST_TARGET
