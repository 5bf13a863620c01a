// The reversed time loop over any cell, for one group of a batch's rows (backward.h), and the gradients
// of inputs.
//
// The loop takes a chunk of steps at a time, the latest first. It leaves the gradients of the chunk's
// pre-activations in d, [blocks][rows of the chunk][gates][lanes]. Read along its rows, d is the left
// operand of the products that give the gradients of states and inputs. Where h is a projection, p
// holds the gradients of its outputs in the same way.
#pragma once

#include "cpu/kernels/squares.h"
#include "cpu/kernels/weight_gradients.h"

namespace rnnfast::RNNFAST_TARGET {

// The weights, packed for products with the gradients of gates.
template <class Cell, class T>
struct BackwardPanels {
  Operand<T>*stage[Cell::stages], *input, *projection;  // [blocks of columns][block, gate, lane][lanes]
  Real<T>* zeros;                                       // zeros_of(layer)

  // The size of one panel, for gradients of `blocks` blocks with `gates` gates each.
  static constexpr index size(index blocks, int gates) {
    return PanelShape<T>(1, blocks * gates * lanes<T>).size;
  }
};

inline constexpr index l2_bytes = 640 * 1024;  // the part of the L2 cache for the weight gradients

template <class Cell, class T>
class BackwardLoop {
 public:
  // `saved`: the slots of the layer's rows. With a null arena it only counts its memory.
  BackwardLoop(const Layer<T>& layer, const Gradients<T>& grads, const SlotMemory<T>& saved,
               const BackwardPanels<Cell, T>& panels, Arena& arena)
      : layer_(layer),
        grads_(grads),
        panels_(panels),
        blocks_(blocks_of<T>(layer.hidden)),
        outputs_(blocks_of<T>(layer.outputs)),
        rows_(most_rows(layer)),
        weights_(layer, grads, rows_, arena) {
    if (layer.batch == 0) layer_.resets = {};  // an array without rows may have no memory
    const index padded = blocks_ * L, state = layer.batch * padded;
    chunk_ = {&layer_, blocks_, outputs_, rows_};
    chunk_.d = arena.template take<T>(rows_ * padded * Cell::gates);
    chunk_.p = arena.template take<T>(is_projected<Cell>(layer_) ? rows_ * outputs_ * L : 0);
    chunk_.operand = arena.template take<T>(weights_.uses_operand(grads) ? rows_ * padded : 0);
    chunk_.positions = arena.template take<Position>(layer.ragged.order ? rows_ : 0);
    if constexpr (on_matrix_unit<T>) {
      // One distance for all products: of two threads one may be a product ahead.
      const index gates = blocks_ * Cell::gates;
      step_row_width_ = padded_width<T>((gates < outputs_ ? outputs_ : gates) * L);
      step_rows_ = arena.template take<Operand<T>>(padded_rows<T>(layer.batch) * step_row_width_);
      chunk_rows_ = arena.template take<Operand<T>>(
          grads.x.data ? padded_rows<T>(rows_) * padded_width<T>(blocks_ * Cell::input.width() * L)
                       : 0);
    }
    dh_ = arena.template take<Real<T>>(layer.batch * outputs_ * L);
    dc_ = arena.template take<Real<T>>(Cell::cell_state < 0 ? 0 : state);
    dq_ = arena.template take<Real<T>>(Cell::stages > 1 || is_projected<Cell>(layer_) ? state : 0);
    c0_ = arena.template take<Real<T>>(Cell::cell_state < 0 ? 0 : state);
    state_ = {&layer_, panels.zeros, c0_, saved, States<Cell, T>::chunk_steps(layer, saved.batch)};
  }

  static index weight_bytes(const Layer<T>& layer) {
    return Cell::gates * layer.hidden * (layer.inputs + layer.outputs) * index{sizeof(Real<T>)};
  }

  BackwardLoop(const BackwardLoop&) = delete;  // state_ points to layer_

  const WeightGradients<Cell, T>& weights() const { return weights_; }

  // All threads of the team call it, each with its rank.
  void run(const Team& team) {
    team_ = team;
    const Part part = part_ = part_of(layer_, team_);
    const Rows rows_to_gather = rows_once(layer_.batch, team_, part);
    prepare(part);
    wait(team_);
    if (layer_.batch == 0) {  // the weight gradients are zero
      Chunk<Cell, T> empty = chunk_;
      empty.steps = {layer_.steps - 1, layer_.steps};
      weights_.add(team_, empty, state_);
      wait(team_);
    }
    for (index t1 = layer_.batch > 0 ? layer_.steps : 0; t1 > 0;) {
      const Chunk<Cell, T> chunk = chunk_before(t1);
      const index piece =
          team_.in_wavefront() ? wavefront_steps(layer_.steps, layer_.batch) : chunk.steps.size();
      for (index end = t1, begin; end > chunk.steps.begin; end = begin) {
        begin = end - piece > chunk.steps.begin ? end - piece : chunk.steps.begin;
        wait_for_source(team_, layer_.steps - begin);
        for (index t = end - 1; t >= begin; --t) step(t, chunk.step_row(t), part);
        find_positions(chunk, {begin, end}, rows_to_gather);
        if (begin == chunk.steps.begin) weights_.gather(chunk, state_, rows_to_gather);
        wait(team_);
        if (grads_.x.data) input_gradients(chunk, {begin, end});
        have_done(team_, layer_.steps - begin);
      }
      weights_.add(team_, chunk, state_);
      wait(team_);
      t1 = chunk.steps.begin;
    }
    if (grads_.h0.data) from_blocks(grads_.h0, dh_, layer_, layer_.outputs, part.rows, part.outputs);
    if (grads_.c0.data) from_blocks(grads_.c0, dc_, layer_, layer_.hidden, part.rows, part.blocks);
  }

 private:
  static constexpr int L = lanes<T>, per = per_word<T>;
  static constexpr int last = Cell::stages - 1;

  // The most rows of a chunk. Many rows make the loads and stores of weight gradients cheap; few rows
  // stay in the L2 cache beside the weight gradients.
  static index most_rows(const Layer<T>& layer) {
    const index bytes = weight_bytes(layer), all_rows = layer.steps * layer.batch;
    index rows = bytes <= l2_bytes ? 128 : bytes <= 4 * l2_bytes ? 256 : 512;
    if (rows < layer.batch) rows = layer.batch;
    return rows < all_rows ? rows : all_rows;
  }

  // The chunk that ends at t1: as many steps as fit in rows_ rows, and at least one.
  Chunk<Cell, T> chunk_before(index t1) const {
    index t0 = t1 - 1;
    while (t0 > 0 && state_.rows_before(t1) - state_.rows_before(t0 - 1) <= rows_) --t0;
    Chunk<Cell, T> chunk = chunk_;
    chunk.steps = {t0, t1};
    chunk.rows = state_.rows_before(t1) - state_.rows_before(t0);
    return chunk;
  }

  // Finds the positions of the rows of some steps of a chunk.
  void find_positions(const Chunk<Cell, T>& chunk, Range steps, Rows rows) {
    if (!chunk.positions) return;
    const Ragged& ragged = layer_.ragged;
    for (index t = steps.begin; t < steps.end; ++t) {
      const Rows active = rows.present(state_.count(t));
      for (index r = 0; r < active.size(); ++r) {
        const index b = active[r];
        chunk.positions[chunk.step_row(t) + b] = ragged.packed
                                                     ? Position{0, ragged.packed[t] + ragged.order[b]}
                                                     : Position{t, ragged.order[b]};
      }
    }
  }

  void prepare(Part part) {
    to_blocks(dh_, grads_.h_n, layer_, layer_.outputs, part.rows, part.outputs);
    if constexpr (Cell::cell_state >= 0) {
      to_blocks(dc_, grads_.c_n, layer_, layer_.hidden, part.rows, part.blocks);
      to_blocks(c0_, layer_.c0, layer_, layer_.hidden, part.rows, part.blocks);
    }
    if (team_.rank == 0) weights_.clear();
  }

  // `step_row`: the first row of step t in the chunk.
  //
  // Tried: to prefetch the slots of the step before changes nothing, since bandwidth is the limit.
  void step(index t, index step_row, Part part) {
    const Rows rows = part.rows.present(state_.count(t));
    if (Cell::cell_state >= 0 && grads_.cell_states.data) add_cell_gradients(t, rows, part.blocks);
    if (is_projected<Cell>(layer_)) {
      output_gradients(t, step_row, rows, part.outputs);
      product({chunk_.p_at(0, step_row), rows_ * L, outputs_, Plain::window}, panels_.projection, t,
              rows, part.blocks, dq_, true);
    }
    apply_all<last>(t, step_row, rows, part.blocks);
    if constexpr (last > 0) {
      gate_product<last>(t, step_row, rows, part.blocks, dq_, true);
      apply_all<last - 1>(t, step_row, rows, part.blocks);
      static_assert(last <= 1);
    }
    if (t > 0 || grads_.h0.data)
      gate_product<0>(t, step_row, rows, part.outputs, dh_, is_projected<Cell>(layer_));
    if (layer_.resets.data) cut(t, rows, part);
  }

  // Adds the incoming gradients of the cell states.
  void add_cell_gradients(index t, Rows rows, Range blocks) {
    for (index r = 0; r < rows.size(); ++r) {
      const index b = rows[r];
      const T* from = state_.row(grads_.cell_states, t, b);
      for (index block = blocks.begin; block < blocks.end; ++block) {
        Real<T>* to = dc_ + (block * layer_.batch + b) * L;
        store(to, load(static_cast<const Real<T>*>(to)) +
                      load_some(from + block * L, layer_.hidden - block * L));
      }
    }
  }

  // Zeros the gradients of the states before a reset.
  void cut(index t, Rows rows, Part part) {
    const auto clear = [&](Real<T>* grads, Range blocks, index b) {
      for (index block = blocks.begin; block < blocks.end; ++block)
        store(grads + (block * layer_.batch + b) * L, Vector<T>{});
    };
    for (index r = 0; r < rows.size(); ++r) {
      const index b = rows[r];
      if (!state_.resets(t, b)) continue;
      clear(dh_, part.outputs, b);
      if (Cell::cell_state >= 0) clear(dc_, part.blocks, b);
    }
  }

  // Where the squares of a block of outputs go, and of a block of cell states.
  Squares squares(index t, index block, bool of_h, bool of_c) const {
    const auto place = [&](double* squares, index blocks) {
      return squares + state_.block_of_step(t, block, blocks);
    };
    return {of_h && grads_.h_squares ? place(grads_.h_squares, outputs_) : nullptr,
            of_c && grads_.c_squares ? place(grads_.c_squares, blocks_) : nullptr, state_.memory.deal};
  }

  // Writes the gradients of the step's projected outputs to p, and their squares.
  void output_gradients(index t, index step_row, Rows rows, Range blocks) {
    for (index r = 0; r < rows.size(); ++r) {
      const index b = rows[r];
      const T* dy = grads_.y.data ? state_.row(grads_.y, t, b) : nullptr;
      for (index block = blocks.begin; block < blocks.end; ++block) {
        const index left = layer_.outputs - block * L;
        Vector<T> v = load(static_cast<const Real<T>*>(dh_) + (block * layer_.batch + b) * L);
        if (dy) v += load_some(dy + block * L, left);
        store(chunk_.p_at(block, step_row + b), left < L ? first_lanes<T>(v, left) : v);
        const Squares to = squares(t, block, true, false);
        if (to) call_write_squares<T>(to, &b, v, v, left);
      }
    }
  }

  template <int s>
  void apply_all(index t, index step_row, Rows rows, Range blocks) {
    for (index begin = 0; begin < rows.size(); begin += strip) {
      const Rows strip_rows = rows.strip_from(begin);
      const index count = strip_rows.size();
      const RowsOfStep<Cell, T, const T> step(state_, grads_.y, t, strip_rows);
      for (index block = blocks.begin; block < blocks.end; ++block) {
        const index offset = block * layer_.batch * L;
        const Local local{block * step.block,
                          dh_ + offset,
                          Cell::cell_state < 0 ? nullptr : dc_ + offset,
                          dq_ ? dq_ + offset : nullptr,
                          chunk_.d_at(block, step_row),
                          chunk_.operand ? chunk_.operand_at(step_row) : nullptr,
                          blocks_ * L,
                          block,
                          layer_.hidden - block * L,
                          grads_.y.data != nullptr,
                          is_projected<Cell>(layer_),
                          squares(t, block, s == last && !is_projected<Cell>(layer_), s == last)};
        index row = 0;
        for (; row + 2 <= count; row += 2) apply<s, VectorPair<Vector<T>>>(step, local, row);
        for (; row < count; ++row) apply<s, Vector<T>>(step, local, row);
      }
    }
  }

  // What apply needs of this object, for one block. apply takes it by value, since the compiler must
  // assume that any store of numbers changes this object.
  struct Local {
    index slots;  // the distance from the slots of block 0 to those of the block
    Real<T>*dh, *dc, *dq;
    T *d, *operand;
    index padded, block, units;
    bool has_dy, is_projected;
    Squares squares;  // of the block
  };

  // Applies the cell's formula to one row, or to two rows where V is a VectorPair.
  template <int s, class V>
  static RNNFAST_INLINE void apply(const RowsOfStep<Cell, T, const T>& step, const Local local,
                                   index row) {
    constexpr index d_size = Cell::gates * L;
    const index unit = local.block * L;
    const auto read = [&](const auto* from, index size) {
      return gather<V>([&](int r) { return load(from + step.b[row + r] * size); });
    };
    const auto write = [&](auto* to, index size, V x) {
      scatter(x, [&](int r, Vector<T> part) { store(to + step.b[row + r] * size, part); });
    };
    V v[Cell::slots], dv[Cell::gates];
#pragma GCC unroll 8
    for (int slot = 0; slot < Cell::slots; ++slot)
      v[slot] = gather<V>([&](int r) {
        return load(static_cast<const Real<T>*>(step.slots[row + r]) + local.slots + slot * L);
      });
    V h = splat<V>(0);
    if constexpr (!Cell::projects)
      h = gather<V>([&](int r) { return load_some(step.h[row + r] + unit, local.units); });
    const V c = gather<V>(
        [&](int r) { return load(step.c[row + r].data + local.block * step.c[row + r].block); });
    const bool dh_of_units = !(Cell::projects && local.is_projected);  // dh has the width H, not R
    V dh = splat<V>(0), dc = splat<V>(0), grad;
    if (dh_of_units) dh = read(local.dh, L);
    if constexpr (Cell::cell_state >= 0) dc = read(local.dc, L);
    // An earlier stage writes only its own gates: other threads may be reading those of the last stage.
    constexpr Window written = s == last ? Window{0, Cell::gates} : Cell::recurrent[s];
    if constexpr (s == last) {
      grad = dh_of_units ? dh : read(local.dq, L);
      if (dh_of_units && local.has_dy)
        grad = grad + gather<V>([&](int r) { return load_some(step.y[row + r] + unit, local.units); });
      dh = splat<V>(0);
#pragma GCC unroll 8
      for (int slot = 0; slot < Cell::gates; ++slot) dv[slot] = splat<V>(0);
    } else {
      grad = read(local.dq, L);
#pragma GCC unroll 8
      for (int slot = written.begin; slot < written.end; ++slot)
        dv[slot] = read(local.d + slot * L, d_size);
    }
    if constexpr (s == last && (last > 0 || Cell::projects))
      if (local.operand) write(local.operand + unit, local.padded, Cell::operand(v, h));
    // The formula computes it too. Here, before any store, the compiler computes it once for both.
    V dc1{};
    if constexpr (Cell::cell_state >= 0) dc1 = Cell::cell_gradient(v, grad, dc);
    Cell::template backward<s>(v, h, c, grad, dv, dh, dc);
    if (dh_of_units) write(local.dh, L, dh);
    if constexpr (Cell::cell_state >= 0) write(local.dc, L, dc);
#pragma GCC unroll 8
    for (int slot = written.begin; slot < written.end; ++slot)
      scatter(dv[slot], [&](int r, Vector<T> x) {
        // Padding must stay zero: an infinite input would make it NaN, and products would spread the
        // NaN.
        store(local.d + step.b[row + r] * d_size + slot * L,
              local.units < L ? first_lanes<T>(x, local.units) : x);
      });
    if (s == last && local.squares) {
      if constexpr (Cell::cell_state < 0)
        write_squares<T>(local.squares, step.b + row, grad, grad, local.units);
      else
        call_write_squares<T>(local.squares, step.b + row, grad, dc1, local.units);
    }
  }

  // Multiplies the gradients of the gates of stage s by its weights.
  template <int s>
  void gate_product(index t, index step_row, Rows rows, Range blocks, Real<T>* to, bool from_zero) {
    product({chunk_.d_at(0, step_row), rows_ * Cell::gates * L, blocks_, Cell::recurrent[s]},
            panels_.stage[s], t, rows, blocks, to, from_zero);
  }

  // The left side of a product: the slots in `window` of `count` blocks, `block_stride` apart, each
  // with all rows of the chunk.
  struct Factor {
    const T* data;
    index block_stride, count;
    Window window;

    index width() const { return count * window.width() * L; }
    Depth depth() const {
      if constexpr (on_matrix_unit<T>) return contiguous<T>(width());
      return {count, block_stride, window.width() * L / per, per};
    }
    const T* row(index n, index all_rows) const {
      return data + n * (block_stride / all_rows) + window.begin * L;
    }
  };

  // Copies row n of a factor, so that a matrix unit can read it.
  void copy_row(Operand<T>* to, const Factor& factor, index n) const {
    const T* from = factor.row(n, rows_);
    const index size = factor.window.width() * L;
    const index padded = padded_words<T>(factor.width()) * per;
    index k = 0;
    for (index block = 0; block < factor.count; ++block, from += factor.block_stride) {
      if constexpr (parts_of<T> == 0) {
        __builtin_memcpy(to + k, from, static_cast<std::size_t>(size) * sizeof(T));
        k += size;
      } else {
        for (index lane = 0; lane < size; lane += L, k += L) store_operand<T>(to, k, load(from + lane));
      }
    }
    for (; k < padded; k += L) store_operand<T>(to, k, Vector<T>{});
  }

  // The rows of a step's product, copied for a matrix unit; the address of the part's first row.
  const Operand<T>* copy_rows(const Factor& factor, index t, Rows active) {
    const index width = step_row_width_;
    const Rows rows = rows_once(layer_.batch, team_, part_).present(state_.count(t));
    Operand<T>* const part_rows = step_rows_ + part_.first_row * width;
    Operand<T>* const to = part_rows + (rows.range.begin - active.range.begin) * width;
    for (index r = 0; r < rows.size(); ++r) copy_row(to + r * width, factor, rows[r]);
    if (team_.split == Split::units) wait(team_);
    return part_rows;
  }

  // to = (where from_zero) or += gradients times weights.
  void product(const Factor& factor, const Operand<T>* weights, index t, Rows rows, Range blocks,
               Real<T>* to, bool from_zero) {
    if (team_.split == Split::units) wait(team_);
    const index panel = panels_.size(factor.count, factor.window.width());
    const Extent extent{factor.depth(), panel, L * per, layer_.batch * L, 0};
    const index width = step_row_width_;
    const Operand<T>* copied = nullptr;
    if constexpr (on_matrix_unit<T>) copied = copy_rows(factor, t, rows);
    for_each_tile<T, 1>(
        rows.size(), blocks, t % 2 == 1, [&](index row, int R, index block, int, auto tile) {
          const Operand<T>* a[tile_rows<T>];
          Real<T>* c[tile_rows<T>];
          for (int r = 0; r < R; ++r) {
            const index b = rows[row + r];
            if constexpr (on_matrix_unit<T>)
              a[r] = copied + (row + r) * width;
            else
              a[r] = factor.row(b, rows_);
            c[r] = to + (block * layer_.batch + b) * L;
          }
          tile(a, weights + block * panel, c, from_zero ? panels_.zeros : nullptr, extent);
        });
  }

  // Writes the gradients of the inputs of some steps of a chunk.
  //
  // Tried: to write from the tile straight to the tensor, without the buffer `result`, changes nothing.
  void input_gradients(const Chunk<Cell, T>& chunk, Range steps) {
    const index begin = chunk.step_row(steps.begin), last_step = chunk.step_row(steps.end - 1);
    const index first_row = begin < last_step ? begin : last_step;
    Range rows =
        share(state_.rows_before(steps.end) - state_.rows_before(steps.begin), team_.size, team_.rank);
    rows = {first_row + rows.begin, first_row + rows.end};
    const Factor factor{chunk.d_at(0, 0), rows_ * Cell::gates * L, blocks_, Cell::input};
    const index panel = panels_.size(blocks_, Cell::input.width());
    const Extent extent{factor.depth(), panel, L * per, L, 0};
    const index width = padded_width<T>(factor.width());
    if constexpr (on_matrix_unit<T>)
      for (index row = rows.begin; row < rows.end; ++row)
        copy_row(chunk_rows_ + row * width, factor, row);
    const Range columns{0, blocks_of<T>(layer_.inputs)};
    for_each_tile<T, 1>(rows.size(), columns, false,
                        [&](index row, int R, index block, int N, auto tile) {
                          const Operand<T>* a[tile_rows<T>];
                          Real<T>* c[tile_rows<T>];
                          alignas(64) Real<T> result[tile_vectors<T> * L];
                          for (int r = 0; r < R; ++r) {
                            const index n = rows.begin + row + r;
                            if constexpr (on_matrix_unit<T>)
                              a[r] = chunk_rows_ + n * width;
                            else
                              a[r] = factor.row(n, rows_);
                            c[r] = result + r * N * L;
                          }
                          tile(a, panels_.input + block * panel, c, panels_.zeros, extent);
                          for (int r = 0; r < R; ++r) {
                            T* to = chunk.row_of(grads_.x, rows.begin + row + r) + block * L;
                            for (int n = 0; n < N; ++n, to += L) {
                              const index count = layer_.inputs - (block + n) * L;
                              Vector<T> v = load(static_cast<const Real<T>*>(c[r]) + n * L);
                              if (grads_.x_accumulate)
                                v = rounded<T>(v) + load_some(static_cast<const T*>(to), count);
                              store_some(to, v, count);
                            }
                          }
                        });
  }

  Layer<T> layer_;
  Gradients<T> grads_;
  BackwardPanels<Cell, T> panels_;
  Team team_;
  Part part_;
  index blocks_, outputs_;  // blocks of the hidden units, and of h
  index rows_;              // the most rows of a chunk
  WeightGradients<Cell, T> weights_;
  Chunk<Cell, T> chunk_;    // without steps
  Real<T>*dh_, *dc_, *dq_;  // [blocks][B][lanes]; dq_: of the operand of a second product
  Real<T>* c0_;
  Operand<T>*step_rows_ = nullptr, *chunk_rows_ = nullptr;  // for a matrix unit: left sides of products
  index step_row_width_ = 0;
  States<Cell, T> state_;
};

}  // namespace rnnfast::RNNFAST_TARGET
