// The time loop over any cell, forward.
//
// The loop takes a chunk of steps at a time, or a piece of a chunk in a wavefront. The input products
// of the chunk go straight into the slots of its steps. Then each step adds its recurrent products to
// its slots and applies the cell's formula, tile by tile. Every pre-activation is the bias, then the
// input products, then the recurrent products, each in the order of k. Where h is a projection, one
// more product turns the formula's result into the step's output.
#pragma once

#include "cpu/kernels/states.h"
#include "cpu/kernels/unpacked.h"

namespace rnnfast::RNNFAST_TARGET {

// One product of the forward pass: rows times the transposed matrix w, which has `units` rows for each
// gate (or in all, where it has no gates) and `depth` columns.
template <class T>
struct Product {
  Window window;
  Matrix<const T> w;
  index units, depth;
  Operand<T>* panels;  // [blocks][k][gates of the window][lanes], see product.h

  // When the weights are packed.
  // - packed: before the first step.
  // - lazy: at their first use, a few blocks at a time, which are then in the cache. Only one thread
  // may
  //   read them.
  // - streamed: as lazy, but the next few blocks overwrite them. Weights that are read once are not
  // worth
  //   a packed copy of them all.
  // - unpacked: never, for a few rows and one or two steps.
  enum class Use { packed, lazy, streamed, unpacked } use;

  PanelShape<T> shape() const { return {window.width(), depth}; }
  index panel() const { return shape().size; }
  Extent extent(index c_panel, index init_panel) const {
    return {contiguous<T>(depth), panel(), shape().step, c_panel, init_panel, shape().gate};
  }
  index units_of(index block) const {
    const index left = units - block * lanes<T>;
    return left < lanes<T> ? left : lanes<T>;
  }
};

template <class Cell, class T>
class Forward {
 public:
  // With a null base it only counts the scratch memory.
  Forward(const Layer<T>& layer, const Team& team, void* base)
      : layer_(layer), team_(team), blocks_(blocks_of<T>(layer.hidden)) {
    const index chunk = States<Cell, T>::chunk_steps(layer, layer.batch), padded = blocks_ * L;
    Arena arena(base), caller_panels(layer.panels);
    const auto product = [&](Window window, Matrix<const T> w, index units, index depth, index times,
                             index rows) {
      Product<T> p{window, w, units, depth, nullptr, use(times, rows)};
      p.panels = (layer.panels ? caller_panels : arena)
                     .template take<Operand<T>>(blocks_of<T>(units) * p.panel());
      return p;
    };
    piece_ = team.in_wavefront() ? wavefront_steps(layer.steps, layer.batch) : chunk;
    if (piece_ > chunk) piece_ = chunk;
    input_ = product(Cell::input, layer.w_ih, layer.hidden, layer.inputs,
                     (layer.steps + piece_ - 1) / piece_, piece_ * layer.batch);
    for (int s = 0; s < Cell::stages; ++s)
      stage_[s] = product(Cell::recurrent[s], layer.w_hh, layer.hidden, operand_width(layer, s),
                          layer.steps, layer.batch);
    if (is_projected<Cell>(layer_))
      projection_ =
          product(Plain::window, layer.w_hr, layer.outputs, layer.hidden, layer.steps, layer.batch);
    bias_ = arena.template take<Real<T>>(padded * Cell::gates);
    const auto take_rows = [&](bool needed, index rows, index width) {
      return arena.template take<Operand<T>>(needed ? padded_rows<T>(rows) * width : 0);
    };
    operand_width_ = on_matrix_unit<T> ? padded_width<T>(layer.hidden) : padded;
    operand_ = take_rows(Cell::stages > 1 || is_projected<Cell>(layer_), layer.batch, operand_width_);
    padded_x_ =
        take_rows(needs_padding<T>(layer.inputs), chunk * layer.batch, padded_width<T>(layer.inputs));
    padded_h_ = take_rows(needs_padding<T>(layer.outputs), layer.batch, padded_width<T>(layer.outputs));
    c0_ = arena.template take<Real<T>>(Cell::cell_state < 0 ? 0 : layer.batch * padded);
    zeros_ = arena.template take<Real<T>>(zeros_of(layer));
    const bool saves = layer.saved;
    Real<T>* const slots = arena.template take<Real<T>>(
        saves ? 0 : 2 * chunk * layer.batch * saved_row<Cell, T>(layer.hidden));
    state_ = {&layer_,
              zeros_,
              c0_,
              {saves ? layer.saved : slots, layer.batch, layer.ragged.rows_before, {}, saves},
              chunk};
    scratch_ = arena.used();
  }

  index scratch() const { return scratch_; }

  // The size of the packed weights of all products, which a caller may keep from call to call.
  index panels_size() const {
    Arena counter(nullptr);
    for_products([&](auto, const Product<T>& product, index blocks) {
      counter.template take<Operand<T>>(blocks * product.panel());
    });
    return counter.used() / index{sizeof(T)};
  }
  void pack_panels() const {
    for_products([](auto kind, const Product<T>& product, index blocks) {
      pack<decltype(kind)>(product, {0, blocks});
    });
  }

  void run() {
    const FlushDenormals guard;
    const MatrixUnit<on_matrix_unit<T>> unit;
    if (layer_.batch == 0) return;
    const Part part = part_of(layer_, team_);
    prepare(part);
    wait(team_);
    for (index t0 = 0; t0 < layer_.steps; t0 += state_.chunk) {
      const index t1 = t0 + state_.chunk < layer_.steps ? t0 + state_.chunk : layer_.steps;
      for (index begin = t0; begin < t1; begin += piece_) {
        const Range piece{begin, begin + piece_ < t1 ? begin + piece_ : t1};
        wait_for_source(team_, piece.end);
        project_inputs(piece, part);
        for (index t = piece.begin; t < piece.end; ++t) step(t, part);
        have_done(team_, piece.end);
      }
    }
  }

 private:
  static constexpr int L = lanes<T>;
  using Use = typename Product<T>::Use;

  // Waits for what the other threads computed of a step, where the team splits the units.
  //
  // Tried: to prefetch what the other thread has just written changes nothing at B=8 while a cache line
  // travels slowly between the cores; otherwise training is 4 to 10 percent slower.
  void wait_for_units() const {
    if (team_.split == Split::units) wait(team_);
  }

  void step(index t, Part part) {
    if (t > 0) wait_for_units();
    stage<0>(t, part);
    if constexpr (Cell::stages > 1) {
      wait_for_units();
      stage<1>(t, part);
    }
    static_assert(Cell::stages <= 2);
    if (is_projected<Cell>(layer_)) {
      wait_for_units();
      project_outputs(t, part);
    }
    if (Cell::cell_state >= 0 && layer_.cell_states.data) write_cell_states(t, part);
    if (t + 1 == layer_.steps || state_.count(t + 1) < state_.count(t)) write_final_states(t, part);
  }

  void prepare(Part part) {
    // Each thread prepares its share of the blocks: those that it alone needs, where the units are
    // split.
    if (!layer_.panels)
      for_products([&](auto kind, const Product<T>& product, index all) {
        if (product.use == Use::packed)
          pack<decltype(kind)>(product, share(all, team_.size, team_.rank));
      });
    const Range blocks = share(blocks_, team_.size, team_.rank);
    for (index block = blocks.begin; block < blocks.end; ++block) sum_biases(block);
    if constexpr (Cell::cell_state >= 0)
      to_blocks(c0_, layer_.c0, layer_, layer_.hidden, part.rows, part.blocks);
    if (team_.rank == 0)
      for (index k = 0; k < zeros_of(layer_); ++k) zeros_[k] = 0;
    if (team_.rank == 0 && operand_ && on_matrix_unit<T>)
      for (index k = 0; k < layer_.batch * operand_width_; ++k) operand_[k] = {};
  }

  // Calls f(Cell{} or Plain{}, product, blocks of the product) for every product.
  template <class F>
  void for_products(F f) const {
    f(Cell{}, input_, blocks_);
    for (const Product<T>& stage : stage_) f(Cell{}, stage, blocks_);
    if (is_projected<Cell>(layer_)) f(Plain{}, projection_, blocks_of<T>(layer_.outputs));
  }

  // How to use the weights of a product of `rows` rows that runs `times` times.
  Use use(index times, index rows) const {
    if (layer_.panels) return Use::packed;
    const index transpositions = times * ((rows + unpacked_tile_rows - 1) / unpacked_tile_rows);
    if (!on_matrix_unit<T> && transpositions <= most_transpositions) return Use::unpacked;
    const bool own_blocks = team_.split == Split::units || team_.size == 1;
    return !own_blocks ? Use::packed : times == 1 ? Use::streamed : Use::lazy;
  }

  template <class Kind>
  static void pack(const Product<T>& product, Range blocks, index shift = 0) {
    for (index block = blocks.begin; block < blocks.end; ++block)
      pack_forward<Kind>(product.panels + (block - shift) * product.panel(), product.w, product.units,
                         product.depth, product.window, block * L, product.units_of(block));
  }

  void sum_biases(index block) {
    const index units = input_.units_of(block);
    for (int slot = 0; slot < Cell::gates; ++slot) {
      const index offset = Cell::weight_block[slot] * layer_.hidden + block * L;
      bool recurrent = false;
      for (Window w : Cell::recurrent) recurrent = recurrent || w.has(slot);
      Vector<T> sum{};
      if (layer_.b_ih && Cell::input.has(slot)) sum += load_some(layer_.b_ih + offset, units);
      if (layer_.b_hh && recurrent) sum += load_some(layer_.b_hh + offset, units);
      store(bias_ + (block * Cell::gates + slot) * L, sum);
    }
  }

  // Calls f(first row, rows, first block, blocks, tile) for tiles that cover the rows and the blocks,
  // as for_each_tile does. A tile has the arguments of tile().
  template <class Kind, int P, class F>
  static void for_tiles(const Product<T>& product, index rows, Range blocks, bool descending, F f) {
    if (on_matrix_unit<T> || product.use != Use::unpacked) {
      for_each_tile<T, P>(rows, blocks, descending,
                          [&](index row, int R, index block, int N, TileFunction<T> tile) {
                            f(row, R, block, N, Tile<Kind, T, P>{tile, R, {}, 0, 0, 0, 0});
                          });
    } else {
      for (index block = blocks.begin; block < blocks.end; ++block)
        for (index row = 0; row < rows; row += unpacked_tile_rows) {
          const int R =
              rows - row < unpacked_tile_rows ? static_cast<int>(rows - row) : unpacked_tile_rows;
          f(row, R, block, 1,
            Tile<Kind, T, P>{
                {}, R, product.w, product.units, product.depth, block * L, product.window.begin});
        }
    }
  }

  // Calls f(blocks, panels) with the packed panels of the blocks; `panels` is the address of block 0. f
  // gets all blocks at once, or a few at a time where they are packed just before. `first_use`: whether
  // this is the product's first use.
  //
  // Tried: one block at a time takes 6 percent less than two for LSTM B=1 H=1024, and the same time for
  // GRU and for narrower layers.
  template <class Kind, int P, class F>
  static void for_panels(const Product<T>& product, Range blocks, bool first_use, F f) {
    const bool streamed = product.use == Use::streamed;
    if (!streamed && !(first_use && product.use == Use::lazy)) return f(blocks, product.panels);
    for (index block = blocks.begin; block < blocks.end; block += most_panels<P>) {
      const index end = block + most_panels<P>;
      const Range piece{block, end < blocks.end ? end : blocks.end};
      const index shift = streamed ? block - blocks.begin : 0;  // every piece overwrites the first
      pack<Kind>(product, piece, shift);
      f(piece, product.panels - shift * product.panel());
    }
  }

  void project_inputs(Range steps, Part part) {
    constexpr int P = Cell::input.width();
    const index block_stride = state_.slots(steps.begin).block;
    const Extent extent = input_.extent(block_stride, Cell::gates * L);
    if (padded_x_) pad_x(steps, part);
    const bool first_use = steps.begin == 0;
    for_panels<Cell, P>(input_, part.blocks, first_use, [&](Range blocks, const Operand<T>* panels) {
      const Operand<T>* x[strip];
      Real<T>* slots[strip];
      index rows = 0;
      const auto project = [&] {
        for_tiles<Cell, P>(input_, rows, blocks, false,
                           [&](index row, int R, index block, int N, const Tile<Cell, T, P>& tile) {
                             Real<T>* c[tile_rows<T>];
                             for (int r = 0; r < R; ++r) c[r] = slots[row + r] + block * block_stride;
                             start_from_bias(c, R, block_stride, block, N);
                             for (int r = 0; r < R; ++r) c[r] += Cell::input.begin * L;
                             tile(x + row, panels + block * extent.panel, c,
                                  bias_ + (block * Cell::gates + Cell::input.begin) * L, extent);
                           });
        rows = 0;
      };
      const Operand<T>* next = padded_x(part);
      for (index t = steps.begin; t < steps.end; ++t) {
        const Slots<Cell, T> step = state_.slots(t);
        const Rows active = part.rows.present(state_.count(t));
        for (index r = 0; r < active.size(); ++r) {
          x[rows] = next ? next : unpadded(state_.row(layer_.x, t, active[r]));
          next += next ? padded_width<T>(layer_.inputs) : 0;
          slots[rows] = step.at(0, active[r]);
          if (++rows == strip) project();
        }
      }
      project();
    });
  }

  // A row that needs no padding.
  static const Operand<T>* unpadded(const T* row) {
    if constexpr (on_matrix_unit<T>)
      return nullptr;
    else
      return row;
  }

  // The copies of the rows of x that a part reads: step by step, one after another. The place of a part
  // is the same for every piece, since another thread may be a piece ahead.
  Operand<T>* padded_x(Part part) const {
    return padded_x_ ? padded_x_ + state_.chunk * part.first_row * padded_width<T>(layer_.inputs)
                     : nullptr;
  }
  void pad_x(Range steps, Part part) {
    wait_for_units();  // other threads may still read the rows of the steps before
    const index width = padded_width<T>(layer_.inputs);
    Operand<T>* to = padded_x(part);
    for (index t = steps.begin; t < steps.end; ++t) {
      const Rows active = part.rows.present(state_.count(t));
      const Rows rows = rows_once(layer_.batch, team_, part).present(state_.count(t));
      const index skipped = rows.range.begin - active.range.begin;  // rows that other threads copy
      for (index r = 0; r < rows.size(); ++r)
        pad_row<T>(to + (skipped + r) * width, state_.row(layer_.x, t, rows[r]), layer_.inputs);
      to += active.size() * width;
    }
    wait_for_units();
  }
  void pad_h(index t, Part part) {
    const index width = padded_width<T>(layer_.outputs);
    const Rows active = part.rows.present(state_.count(t));
    const Rows rows = rows_once(layer_.batch, team_, part).present(state_.count(t));
    Operand<T>* to = padded_h_ + (part.first_row + rows.range.begin - active.range.begin) * width;
    for (index r = 0; r < rows.size(); ++r)
      pad_row<T>(to + r * width, state_.h(t, rows[r]), layer_.outputs);
    wait_for_units();
  }

  // Sets the gates that the input does not feed to their bias.
  void start_from_bias(Real<T>* const* slots, int R, index block_stride, index block, int N) {
    for (int slot = 0; slot < Cell::gates; ++slot)
      if (!Cell::input.has(slot))
        for (int n = 0; n < N; ++n)
          for (int r = 0; r < R; ++r)
            store(slots[r] + n * block_stride + slot * L,
                  load(static_cast<const Real<T>*>(bias_) + ((block + n) * Cell::gates + slot) * L));
  }

  template <int s>
  void stage(index t, Part part) {
    constexpr Window window = Cell::recurrent[s];
    constexpr int P = window.width();
    const Rows active = part.rows.present(state_.count(t));
    if (s == 0 && padded_h_) pad_h(t, part);
    for (index begin = 0; begin < active.size(); begin += strip) {
      const Rows rows = active.strip_from(begin);
      const RowsOfStep<Cell, T, T> step(state_, layer_.y, t, rows);
      const Extent extent = stage_[s].extent(step.block, 0);
      const index first = part.first_row + begin;
      Operand<T>* const operand = operand_ ? operand_ + first * operand_width_ : nullptr;
      const Operand<T>* a[strip];
      for (index r = 0; r < rows.size(); ++r)
        a[r] = s > 0       ? operand + r * operand_width_
               : padded_h_ ? padded_h_ + (first + r) * padded_width<T>(layer_.outputs)
                           : unpadded(step.h[r]);
      const bool first_use = t == 0 && begin == 0;
      for_panels<Cell, P>(
          stage_[s], part.blocks, first_use, [&](Range blocks, const Operand<T>* panels) {
            for_tiles<Cell, P>(stage_[s], rows.size(), blocks, t % 2 == 1,
                               [&](index row, int R, index block, int N, const Tile<Cell, T, P>& tile) {
                                 Real<T>* c[tile_rows<T>];
                                 for (int r = 0; r < R; ++r)
                                   c[r] = step.slots[row + r] + block * step.block + window.begin * L;
                                 tile(a + row, panels + block * extent.panel, c, nullptr, extent);
                                 for (int n = 0; n < N; ++n)
                                   apply_to<s>(step, operand, block + n, {row, row + R});
                               });
          });
    }
  }

  // Applies the cell's formula to one block of units, for some rows of the strip.
  template <int s>
  void apply_to(const RowsOfStep<Cell, T, T>& step, Operand<T>* operand, index block, Range rows) {
    const index units = layer_.hidden - block * L;
    const index width = operand_width_;
    index row = rows.begin;
    for (; row + 2 <= rows.end; row += 2)
      apply<s, VectorPair<Vector<T>>>(step, operand, width, block, units, row);
    for (; row < rows.end; ++row) apply<s, Vector<T>>(step, operand, width, block, units, row);
  }

  // The same for one row, or for two rows where V is a VectorPair.
  template <int s, class V>
  static RNNFAST_INLINE void apply(const RowsOfStep<Cell, T, T>& step, Operand<T>* operand, index width,
                                   index block, index units, index row) {
    const index unit = block * L, offset = block * step.block;
    V v[Cell::slots];
#pragma GCC unroll 8
    for (int slot = 0; slot < Cell::gates; ++slot)
      v[slot] = gather<V>([&](int r) {
        return load(static_cast<const Real<T>*>(step.slots[row + r]) + offset + slot * L);
      });
    V h = splat<V>(0);
    if constexpr (!Cell::projects)
      h = gather<V>([&](int r) { return load_some(step.h[row + r] + unit, units); });
    const V c =
        gather<V>([&](int r) { return load(step.c[row + r].data + block * step.c[row + r].block); });
    const V out = Cell::template forward<s>(v, h, c);
#pragma GCC unroll 8
    for (int slot = 0; slot < Cell::slots; ++slot)
      scatter(v[slot], [&](int r, Vector<T> x) { store(step.slots[row + r] + offset + slot * L, x); });
    scatter(out, [&](int r, Vector<T> x) {
      // A word of the next product may end with padding, which an infinite input makes NaN.
      if ((s + 1 < Cell::stages || Cell::projects) && operand)
        store_operand<T>(operand + (row + r) * width, unit,
                         per_word<T> > 1 && units < L ? first_lanes<T>(x, units) : x);
      else
        store_some(step.y[row + r] + unit, x, units);
    });
  }

  void project_outputs(index t, Part part) {
    const Extent extent = projection_.extent(L, 0);
    const Rows active = part.rows.present(state_.count(t));
    for (index begin = 0; begin < active.size(); begin += strip) {
      const Rows rows = active.strip_from(begin);
      const Operand<T>* a[strip];
      for (index r = 0; r < rows.size(); ++r)
        a[r] = operand_ + (part.first_row + begin + r) * operand_width_;
      const bool first_use = t == 0 && begin == 0;
      for_panels<Plain, 1>(
          projection_, part.outputs, first_use, [&](Range blocks, const Operand<T>* panels) {
            for_tiles<Plain, 1>(
                projection_, rows.size(), blocks, t % 2 == 1,
                [&](index row, int R, index block, int N, const Tile<Plain, T, 1>& tile) {
                  Real<T>* c[tile_rows<T>];
                  alignas(64) Real<T> result[tile_vectors<T> * L];
                  for (int r = 0; r < R; ++r) c[r] = result + r * N * L;
                  tile(a + row, panels + block * extent.panel, c, zeros_, extent);
                  for (int r = 0; r < R; ++r)
                    for (int n = 0; n < N; ++n)
                      store_some(state_.row(layer_.y, t, rows[row + r]) + (block + n) * L,
                                 load(static_cast<const Real<T>*>(c[r]) + n * L),
                                 projection_.units_of(block + n));
                });
          });
    }
  }

  void write_cell_states(index t, Part part) {
    const Rows active = part.rows.present(state_.count(t));
    const Slots<Cell, T> slots = state_.slots(t);
    for (index r = 0; r < active.size(); ++r)
      for (index block = part.blocks.begin; block < part.blocks.end; ++block)
        store_some(state_.row(layer_.cell_states, t, active[r]) + block * L,
                   load(slots.at(block, active[r]) + Cell::cell_state * L), layer_.hidden - block * L);
  }

  // Writes the final states of the rows whose last step is t. Inference overwrites their slots later.
  void write_final_states(index t, Part part) {
    const Rows continuing = part.rows.present(t + 1 < layer_.steps ? state_.count(t + 1) : 0);
    const Rows active = part.rows.present(state_.count(t));
    const Slots<Cell, T> slots = state_.slots(t);
    for (index r = continuing.size(); r < active.size(); ++r) {
      const index b = active[r], row = layer_.ragged.batch_row(b);
      for (index k = part.outputs.begin * L; layer_.h_n.data && k < part.outputs.end * L; k += L) {
        const T* y = state_.row(layer_.y, t, b) + k;
        store_some(layer_.h_n.data + row * layer_.h_n.row + k, load_some(y, layer_.outputs - k),
                   layer_.outputs - k);
      }
      for (index block = part.blocks.begin; layer_.c_n.data && block < part.blocks.end; ++block)
        store_some(layer_.c_n.data + row * layer_.c_n.row + block * L,
                   load(slots.at(block, b) + Cell::cell_state * L), layer_.hidden - block * L);
    }
  }

  const Layer<T> layer_;
  const Team team_;
  const index blocks_;
  index operand_width_;
  index piece_;  // the steps whose inputs are multiplied at once: a chunk, or fewer in a wavefront
  index scratch_;
  Product<T> input_, stage_[Cell::stages], projection_;
  Real<T>* bias_;        // [blocks][gates][lanes]
  Operand<T>* operand_;  // [B][operand width], of the second stage or of the projection
  Operand<T>*padded_x_,
      *padded_h_;  // [rows of a chunk][padded I], [B][padded R]; null: no padding is needed
  Real<T>*c0_, *zeros_;
  States<Cell, T> state_;
};

}  // namespace rnnfast::RNNFAST_TARGET
