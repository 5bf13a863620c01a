// The gradients of the weights: sums over time and batch of features times panels. The features are x,
// h or the operand of a second product. The panels are the gradients of the gates, and k runs over
// their rows. The sums run in one fixed order, the latest chunk first, for all teams.
#pragma once

#include "cpu/kernels/states.h"

namespace rnnfast::RNNFAST_TARGET {

// Where a row of a chunk lies: row b of step t of a padded sequence, or row b of a packed one.
struct Position {
  index t, b;
};

// The results of the reversed loop for a chunk of steps. The rows of a step follow one another. The
// rows of ragged steps are in the order of a packed sequence.
template <class Cell, class T>
struct Chunk {
  static constexpr int L = lanes<T>;

  const Layer<T>* layer;
  index blocks, outputs;  // blocks of the hidden units, and of h
  index capacity;         // the most rows
  T* d = nullptr;         // [blocks][capacity][gates][lanes], the gradients of the pre-activations
  T* p = nullptr;         // [outputs][capacity][lanes], the gradients of the outputs of a projection
  T* operand = nullptr;   // [capacity][blocks][lanes], the operand of a second product
  Position* positions = nullptr;  // [capacity]; null: the rows are in the order of memory
  Range steps{};
  index rows = 0;

  T* d_at(index block, index row) const { return d + (block * capacity + row) * Cell::gates * L; }
  T* p_at(index block, index row) const { return p + (block * capacity + row) * L; }
  T* operand_at(index row) const { return operand + row * blocks * L; }

  // The row of a packed sequence that is row 0 of a ragged chunk.
  index first_row() const {
    const index a = layer->ragged.first_row[steps.begin], b = layer->ragged.first_row[steps.end - 1];
    return a < b ? a : b;
  }
  // The first row of step t in the chunk.
  index step_row(index t) const {
    if (layer->ragged.first_row) return layer->ragged.first_row[t] - first_row();
    return (t - steps.begin) * layer->batch;
  }
  // The features of a row of the chunk in a sequence.
  template <class U>
  U* row_of(Sequence<U> sequence, index row) const {
    if (positions)
      return sequence.data + positions[row].t * sequence.step + positions[row].b * sequence.row;
    if (layer->ragged.packed) return sequence.data + (first_row() + row) * sequence.row;
    return sequence.data + (steps.begin + row / layer->batch) * sequence.step +
           row % layer->batch * sequence.row;
  }
};

template <class Cell, class T>
class WeightGradients {
 public:
  // With a null arena it only counts its memory.
  WeightGradients(const Layer<T>& layer, const Gradients<T>& grads, index capacity, Arena& arena)
      : layer_(layer),
        grads_(grads),
        blocks_(blocks_of<T>(layer.hidden)),
        outputs_(blocks_of<T>(layer.outputs)),
        capacity_(capacity) {
    const index padded = blocks_ * L;
    const bool w_ih = grads.w_ih.data, w_hh = grads.w_hh.data, w_hr = grads.w_hr.data;
    for (int s = 0; s < Cell::stages; ++s)
      dw_hh_[s] = arena.template take<Real<T>>(
          w_hh ? padded * Cell::recurrent[s].width() * operand_width(layer, s) : 0);
    dw_hr_ = arena.template take<Real<T>>(w_hr ? outputs_ * L * layer.hidden : 0);
    dw_ih_ = arena.template take<Real<T>>(w_ih ? padded * Cell::input.width() * layer.inputs : 0);
    db_ = arena.template take<Real<T>>(padded * Cell::gates);
    if constexpr (in_pairs) {
      const auto take = [&](bool wanted, index width) {
        return arena.template take<Operand<T>>(wanted ? paired(capacity_) * width : 0);
      };
      const auto take_features = [&](bool wanted, index count) {
        if constexpr (!on_matrix_unit<T>) return take(wanted, count);
        return arena.template take<Operand<T>>(
            wanted ? padded_rows<T>(count) * padded_width<T>(capacity_) : 0);
      };
      h_rows_ = arena.template take<const T*>(w_hh ? capacity_ : 0);
      x_ = take_features(w_ih, layer.inputs);
      h_ = take_features(w_hh, layer.outputs);
      operand_ = take_features(uses_operand(grads), padded);
      d_ = take(w_ih || w_hh, padded * Cell::gates);
      p_ = take(w_hr, outputs_ * L);
    } else {
      const bool scattered = layer.ragged.count || layer.resets.data;
      h_ = arena.template take<T>(w_hh && scattered ? capacity_ * layer.outputs : 0);
      x_ = arena.template take<T>(w_ih && layer.ragged.order ? capacity_ * layer.inputs : 0);
    }
  }

  // Whether the operand of a second product is needed here.
  static bool uses_operand(const Gradients<T>& grads) {
    return (Cell::stages > 1 && grads.w_hh.data) || grads.w_hr.data;
  }

  // The sums over all rows: [blocks][features][gates of the window][lanes]; db [blocks][gates][lanes].
  Real<T>* dw_ih() const { return dw_ih_; }
  Real<T>* dw_hh(int s) const { return dw_hh_[s]; }
  Real<T>* dw_hr() const { return dw_hr_; }
  Real<T>* db() const { return db_; }

  void clear() {
    for (index k = 0; k < blocks_ * Cell::gates * L; ++k) db_[k] = 0;
  }

  // Gathers x and the h before each of the chunk's rows, where they are scattered in memory. Takes only
  // `rows` of the batch.
  void gather(const Chunk<Cell, T>& chunk, const States<Cell, T>& states, Rows rows) {
    const auto copy = [](T* to, index row, index width, const T* from) {
      if (to) __builtin_memcpy(to + row * width, from, static_cast<std::size_t>(width) * sizeof(T));
    };
    if (!(in_pairs ? h_rows_ != nullptr : h_ || x_)) return;
    for (index t = chunk.steps.begin; t < chunk.steps.end; ++t) {
      const Rows active = rows.present(states.count(t));
      for (index r = 0; r < active.size(); ++r) {
        const index b = active[r], row = chunk.step_row(t) + b;
        if constexpr (in_pairs) {
          h_rows_[row] = states.h(t, b);
        } else {
          copy(h_, row, layer_.outputs, states.h(t, b));
          copy(x_, row, layer_.inputs, states.row(layer_.x, t, b));
        }
      }
    }
  }

  // All threads of the team call it, after a barrier.
  void add(const Team& team, const Chunk<Cell, T>& chunk, const States<Cell, T>& states) {
    if constexpr (in_pairs) pair_chunk(team, chunk);
    const bool first_chunk = chunk.steps.end == layer_.steps;
    if (grads_.w_ih.data)
      sum<Cell::input.width()>(team, dw_ih_, first_chunk, features_of_x(chunk),
                               gates(chunk, Cell::input), blocks_);
    if (grads_.w_hh.data) {
      add_recurrent(team, chunk, states, first_chunk);
      if constexpr (last > 0)
        sum<Cell::recurrent[last].width()>(team, dw_hh_[last], first_chunk, features_of_operand(chunk),
                                           gates(chunk, Cell::recurrent[last]), blocks_);
    }
    if (grads_.w_hr.data)
      sum<1>(team, dw_hr_, first_chunk, features_of_operand(chunk), outputs_of(chunk), outputs_);
    if (grads_.b_ih || grads_.b_hh) {
      const Range blocks = share(blocks_, team.size, team.rank);
      for (index block = blocks.begin; block < blocks.end; ++block)
        sum_rows(db_ + block * Cell::gates * L, chunk.d_at(block, 0), chunk.rows);
    }
  }

 private:
  static constexpr int L = lanes<T>, per = per_word<T>, last = Cell::stages - 1;
  // A word of bfloat16 has two neighbours along the sum: two rows of features or of panels are copied
  // into one row of pairs (pair_rows). A matrix unit reads features whose rows follow one another
  // (turn_rows).
  static constexpr bool in_pairs = per == 2;

  static constexpr index paired(index rows) {
    return padded_words<T>(rows) * per * (on_matrix_unit<T> ? matrix_parts<T> : 1);
  }

  // `count` features. Feature k of the first row is at data + k * distance; `depth` says where the
  // other rows are.
  struct Features {
    const Operand<T>* data;
    index count;
    Depth depth;
    index distance = per;
  };

  // Features of rows, or of pairs of rows, that follow one another.
  Features dense(const Operand<T>* data, index count, index rows, index stride) const {
    if constexpr (on_matrix_unit<T>)
      return {data, count, contiguous<T>(rows), padded_width<T>(capacity_)};
    return {data, count, {1, 0, words<T>(rows), stride * per}};
  }

  Features features_of_x(const Chunk<Cell, T>& chunk) const {
    if constexpr (in_pairs) {
      return dense(x_, layer_.inputs, chunk.rows, layer_.inputs);
    } else {
      if (x_) return dense(x_, layer_.inputs, chunk.rows, layer_.inputs);
      if (layer_.ragged.packed)
        return dense(chunk.row_of(layer_.x, 0), layer_.inputs, chunk.rows, layer_.x.row);
      return {layer_.x.data + chunk.steps.begin * layer_.x.step, layer_.inputs,
              depth_over(chunk.steps.size(), layer_.x.step, layer_.x.row)};
    }
  }

  Features features_of_operand(const Chunk<Cell, T>& chunk) const {
    if constexpr (in_pairs)
      return dense(operand_, layer_.hidden, chunk.rows, blocks_ * L);
    else
      return dense(chunk.operand, layer_.hidden, chunk.rows, blocks_ * L);
  }

  Depth depth_over(index steps, index step, index row) const {
    return layer_.batch == 1 ? Depth{1, 0, steps, step} : Depth{steps, step, layer_.batch, row};
  }

  // The gradients of a window's gates, from row `row` of the chunk on.
  Panels<Operand<T>> gates(const Chunk<Cell, T>& chunk, Window window, index row = 0) const {
    if constexpr (in_pairs)
      return {d_ + window.begin * L * per, paired(capacity_) * Cell::gates * L, Cell::gates * L * per};
    else
      return {chunk.d_at(0, row) + window.begin * L, capacity_ * Cell::gates * L, Cell::gates * L};
  }

  // The gradients of the outputs of a projection.
  Panels<Operand<T>> outputs_of(const Chunk<Cell, T>& chunk) const {
    if constexpr (in_pairs)
      return {p_, paired(capacity_) * L, L * per};
    else
      return {chunk.p, capacity_ * L, L};
  }

  // W_hh of the first stage. h is read from y where its rows follow one another in y.
  void add_recurrent(const Team& team, const Chunk<Cell, T>& chunk, const States<Cell, T>& states,
                     bool first_chunk) {
    constexpr Window window = Cell::recurrent[0];
    const auto add_product = [&](bool from_zero, const Features& h, index row) {
      sum<window.width()>(team, dw_hh_[0], from_zero, h, gates(chunk, window, row), blocks_);
    };
    // A copy of no rows has no memory, and its product still writes zeros.
    if (in_pairs || h_)
      return add_product(first_chunk, dense(h_, layer_.outputs, chunk.rows, layer_.outputs), 0);
    if constexpr (!in_pairs) {
      const Range steps = chunk.steps;
      const index begin = steps.begin > 0 ? steps.begin : 1;
      if (begin < steps.end)
        add_product(first_chunk,
                    {states.row(layer_.y, begin - 1, 0), layer_.outputs,
                     depth_over(steps.end - begin, layer_.y.step, layer_.y.row)},
                    (begin - steps.begin) * layer_.batch);
      if (steps.begin == 0)
        add_product(
            first_chunk && begin >= steps.end,
            dense(states.h(0, 0), layer_.outputs, layer_.batch, layer_.h0.data ? layer_.h0.row : 0), 0);
    }
  }

  void pair_chunk(const Team& team, const Chunk<Cell, T>& chunk) {
    constexpr index unit = on_matrix_unit<T> ? matrix_words : 1;
    const index rows = chunk.rows, padded = blocks_ * L;
    const Range units = share(padded_words<T>(rows) / unit, team.size, team.rank);
    const Range pairs{units.begin * unit, units.end * unit};
    const auto copy_features = [&](Operand<T>* to, index count, auto row) {
      if (!to) return;
      if constexpr (on_matrix_unit<T>)
        turn_rows<T>(to, padded_width<T>(capacity_), count, units, rows, row);
      else
        pair_rows<T>(to, count, pairs, rows, row);
    };
    copy_features(x_, layer_.inputs, [&](index r) { return chunk.row_of(layer_.x, r); });
    copy_features(h_, layer_.outputs, [&](index r) { return h_rows_[r]; });
    copy_features(operand_, padded, [&](index r) { return chunk.operand_at(r); });
    for (index block = 0; d_ && block < blocks_; ++block)
      pair_rows<T>(d_ + block * paired(capacity_) * Cell::gates * L, Cell::gates * L, pairs, rows,
                   [&](index r) { return chunk.d_at(block, r); });
    for (index block = 0; p_ && block < outputs_; ++block)
      pair_rows<T>(p_ + block * paired(capacity_) * L, L, pairs, rows,
                   [&](index r) { return chunk.p_at(block, r); });
    wait(team);
  }

  // to += the sum of all rows, for all gates, in slices as in the products.
  static void sum_rows(Real<T>* to, const T* from, index rows) {
    for (index r = 0; r < rows;) {
      const index end = r + slice<T> < rows ? r + slice<T> : rows;
      Vector<T> total[Cell::gates] = {};
      for (; r < end; ++r)
#pragma GCC unroll 8
        for (int slot = 0; slot < Cell::gates; ++slot)
          total[slot] += load(from + (r * Cell::gates + slot) * L);
#pragma GCC unroll 8
      for (int slot = 0; slot < Cell::gates; ++slot)
        store(to + slot * L, load(static_cast<const Real<T>*>(to) + slot * L) + total[slot]);
    }
  }

  // to[block][feature][P][lanes] = (where from_zero) or += the sum over the rows k of features[k] *
  // panels[k].
  //
  // Tried: sums of the bias gradients beside the tiles that read the same panel gain nothing.
  // Tried: copies of x and h in the order of the chunk, for batches of 2 to 32 rows, gain 0 to 2
  // percent of training.
  // Tried: to prefetch the rows of h and dy sixteen rows ahead changes nothing.
  template <int P>
  void sum(const Team& team, Real<T>* to, bool from_zero, const Features& features,
           Panels<Operand<T>> panels, index all_blocks) {
    const index count = features.count;
    const Depth depth = features.depth;
    const bool by_blocks = all_blocks >= 4 * team.size || all_blocks % team.size == 0;
    const Range blocks = by_blocks ? share(all_blocks, team.size, team.rank) : Range{0, all_blocks};
    const Range feature_range = by_blocks ? Range{0, count} : share(count, team.size, team.rank);
    // A tile cuts its sum into slices either between steps or within one step. So each step is its
    // own sum where it has more rows than a slice.
    const index sums = depth.inner > slice<T> ? depth.outer : 1;
    const Depth sum_depth{depth.outer / sums, depth.outer_stride, depth.inner, depth.inner_stride};
    const Extent extent{sum_depth, panels.panel, panels.step, count * P * L, 0, L * per};
    for_each_tile<T, P>(feature_range.size(), blocks, false,
                        [&](index row, int R, index block, int, auto tile) {
                          const Operand<T>* a[tile_rows<T>];
                          Real<T>* c[tile_rows<T>];
                          for (int r = 0; r < R; ++r) {
                            a[r] = features.data + (feature_range.begin + row + r) * features.distance;
                            c[r] = to + (block * count + feature_range.begin + row + r) * P * L;
                          }
                          const Operand<T>* b = panels.data + block * panels.panel;
                          for (index n = 0; n < sums; ++n, b += depth.inner * panels.step) {
                            tile(a, b, c, from_zero && n == 0 ? zeros : nullptr, extent);
                            for (int r = 0; r < R; ++r) a[r] += depth.outer_stride;
                          }
                        });
  }

  static constexpr Real<T> zeros[4 * L] = {};  // `init` of a tile

  const Layer<T> layer_;
  const Gradients<T> grads_;
  const index blocks_, outputs_, capacity_;
  Real<T>*dw_ih_, *dw_hh_[Cell::stages], *dw_hr_, *db_;
  const T** h_rows_ = nullptr;  // in_pairs: the address of h before each row of the chunk
  Operand<T>* h_;               // copy of h before each row, where rows are ragged, reset, or in_pairs
  Operand<T>* x_ = nullptr;     // copy of x, where its rows are not in the order of memory, or in_pairs
  Operand<T>*operand_ = nullptr, *d_ = nullptr, *p_ = nullptr;  // copies, where in_pairs
};

}  // namespace rnnfast::RNNFAST_TARGET
