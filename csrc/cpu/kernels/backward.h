// Backward of a layer: packs the weights, runs the reversed loop over groups of rows, and adds up the
// weight gradients of the groups.
//
// A large batch is cut into two groups, which share nothing until their weight gradients are added at
// the end. Two threads then meet once a call instead of twice a chunk, and no gradient of a gate has to
// travel from one core's cache to another's. A batch is not cut where the caches cannot hold two copies
// of the weight gradients. The cut depends on the layer's sizes alone, so that sums have the same order
// for all teams. Rows of different lengths are dealt to the two groups (states.h), so that both groups
// have about equally many rows.
#pragma once

#include "cpu/kernels/backward_loop.h"

namespace rnnfast::RNNFAST_TARGET {

template <class Cell, class T>
class Backward {
 public:
  // With a null base it only counts the scratch memory.
  Backward(const Layer<T>& layer, const Gradients<T>& grads, void* base)
      : layer_(layer),
        grads_(grads),
        blocks_(blocks_of<T>(layer.hidden)),
        arena_(base),
        panels_(take_panels()),
        loops_{loop(0), loop(1)} {}

  index scratch() const { return arena_.used(); }

  static int groups(const Layer<T>& layer) {
    constexpr index least_rows = 512, least_batch = 8;
    const Ragged& ragged = layer.ragged;
    const index rows = ragged.count ? ragged.rows_before[layer.steps] : layer.steps * layer.batch;
    const bool cut = rows >= least_rows && layer.batch >= least_batch &&
                     BackwardLoop<Cell, T>::weight_bytes(layer) <= l2_bytes;
    return cut ? 2 : 1;
  }

  void run(const Team& team) {
    const FlushDenormals guard;
    const MatrixUnit<on_matrix_unit<T>> unit;
    pack(team);
    wait(team);
    const int n = groups(layer_);
    if (n == 2 && team.size % 2 == 0) {
      const int half = team.size / 2, k = team.rank / half;
      loops_[k].run({team.rank % half, half, team.split, team.barrier + 1 + k});
    } else {
      for (int k = 0; k < n; ++k) loops_[k].run(team);
    }
    wait(team);
    write_weight_gradients(team);
  }

 private:
  static constexpr int L = lanes<T>;

  using AllPanels = BackwardPanels<Cell, T>;

  // The size of one panel of each kind, in numbers.
  index stage_size(int s) const { return AllPanels::size(blocks_, Cell::recurrent[s].width()); }
  index input_size() const { return AllPanels::size(blocks_, Cell::input.width()); }
  index projection_size() const { return AllPanels::size(blocks_of<T>(layer_.outputs), 1); }

  BackwardPanels<Cell, T> take_panels() {
    BackwardPanels<Cell, T> panels;
    const index columns = blocks_of<T>(layer_.inputs);
    for (int s = 0; s < Cell::stages; ++s)
      panels.stage[s] =
          arena_.template take<Operand<T>>(blocks_of<T>(operand_width(layer_, s)) * stage_size(s));
    panels.input = arena_.template take<Operand<T>>(grads_.x.data ? columns * input_size() : 0);
    panels.projection =
        arena_.template take<Operand<T>>(is_projected<Cell>(layer_) ? blocks_ * projection_size() : 0);
    panels.zeros = arena_.template take<Real<T>>(zeros_of(layer_));
    return panels;
  }

  // The loop over group k. Where there is no group k, the loop has no memory and never runs.
  BackwardLoop<Cell, T> loop(int k) {
    Arena none(nullptr);
    Arena& arena = k < groups(layer_) ? arena_ : none;
    if (groups(layer_) == 2 && layer_.ragged.count) return ragged_loop(k, arena);
    return dense_loop(k < groups(layer_) ? k : 0, arena);
  }

  BackwardLoop<Cell, T> dense_loop(int k, Arena& arena) {
    const Range rows = share(layer_.batch, groups(layer_), k);
    const auto group_part = [&](auto tensor) {
      if (tensor.data) tensor.data += rows.begin * tensor.row;
      return tensor;
    };
    Layer<T> layer = layer_;
    layer.batch = rows.size();
    layer.x = group_part(layer.x);
    layer.y = group_part(layer.y);
    layer.resets = group_part(layer.resets);
    layer.h0 = group_part(layer.h0);
    layer.c0 = group_part(layer.c0);
    Gradients<T> grads = grads_;
    grads.y = group_part(grads.y);
    grads.cell_states = group_part(grads.cell_states);
    grads.x = group_part(grads.x);
    grads.h_n = group_part(grads.h_n);
    grads.c_n = group_part(grads.c_n);
    grads.h0 = group_part(grads.h0);
    grads.c0 = group_part(grads.c0);
    if (grads.h_squares) grads.h_squares += rows.begin;
    if (grads.c_squares) grads.c_squares += rows.begin;
    return {layer, grads, slots_from(rows.begin, {}), panels_, arena};
  }

  // The loop over the rows that are dealt to group k.
  BackwardLoop<Cell, T> ragged_loop(int k, Arena& arena) {
    Layer<T> layer = layer_;
    layer.batch = Deal{2, k}.count(layer_.batch);
    const auto take = [&](index*& numbers, index count) {
      numbers = arena.template take<index>(count);
      // Where memory is only counted, the loop asks whether the array is null, and never reads it.
      return numbers ? numbers : layer_.ragged.count;
    };
    GroupRows& group = group_rows_[k];
    layer.ragged.count = take(group.count, layer.steps);
    layer.ragged.first_row = layer.ragged.rows_before = take(group.rows_before, layer.steps + 1);
    layer.ragged.order = take(group.order, layer.batch);
    return {layer, grads_, slots_from(0, {2, k}), panels_, arena};
  }

  SlotMemory<T> slots_from(index row, Deal deal) const {
    return {layer_.saved + row * Cell::slots * L, layer_.batch, layer_.ragged.rows_before, deal, true};
  }

  // Finds which rows of each step group k has. The rows of its chunks are in the order of processing.
  void find_group_rows(int k) {
    const GroupRows& group = group_rows_[k];
    const Deal deal{2, k};
    if (!group.count) return;
    group.rows_before[0] = 0;
    for (index t = 0; t < layer_.steps; ++t) {
      group.count[t] = deal.count(layer_.ragged.count[t]);
      group.rows_before[t + 1] = group.rows_before[t] + group.count[t];
    }
    for (index b = 0; b < deal.count(layer_.batch); ++b)
      group.order[b] = layer_.ragged.batch_row(deal.row(b));
  }

  void pack(const Team& team) {
    // Packs this thread's share of the blocks of `columns` columns of a matrix.
    const auto pack_share = [&](index columns, auto pack_block) {
      const Range blocks = share(blocks_of<T>(columns), team.size, team.rank);
      for (index block = blocks.begin; block < blocks.end; ++block)
        pack_block(block, block * L, columns - block * L);
    };
    for (int s = 0; s < Cell::stages; ++s)
      pack_share(operand_width(layer_, s), [&](index block, index column, index columns) {
        pack_backward<Cell>(panels_.stage[s] + block * stage_size(s), layer_.w_hh, layer_.hidden,
                            Cell::recurrent[s], column, columns);
      });
    if (grads_.x.data)
      pack_share(layer_.inputs, [&](index block, index column, index columns) {
        pack_backward<Cell>(panels_.input + block * input_size(), layer_.w_ih, layer_.hidden,
                            Cell::input, column, columns);
      });
    if (is_projected<Cell>(layer_))
      pack_share(layer_.hidden, [&](index block, index column, index columns) {
        pack_backward<Plain>(panels_.projection + block * projection_size(), layer_.w_hr,
                             layer_.outputs, Plain::window, column, columns);
      });
    if (team.rank > 0) return;
    for (index k = 0; k < zeros_of(layer_); ++k) panels_.zeros[k] = 0;
    for (int k = 0; k < 2; ++k) find_group_rows(k);
  }

  // Adds the second group's sums to the first's, and writes them in torch's layout.
  void write_weight_gradients(const Team& team) {
    const bool two = groups(layer_) == 2;
    const auto sum = [&](Real<T>* to, const Real<T>* other, index size, index block) {
      to += block * size;
      if (two)
        for (index k = 0; k < size; k += L)
          store(to + k, load(static_cast<const Real<T>*>(to) + k) + load(other + block * size + k));
      return to;
    };
    const Range blocks = share(blocks_, team.size, team.rank);
    for (index block = blocks.begin; block < blocks.end; ++block) {
      const index unit = block * L, units = layer_.hidden - unit < L ? layer_.hidden - unit : L;
      const auto write = [&](Matrix<T> w, Window window, index features, Real<T>* to,
                             const Real<T>* other) {
        if (w.data)
          unpack_forward<Cell>(w, sum(to, other, window.width() * features * L, block), layer_.hidden,
                               features, window, unit, units);
      };
      write(grads_.w_ih, Cell::input, layer_.inputs, loops_[0].weights().dw_ih(),
            loops_[1].weights().dw_ih());
      for (int s = 0; s < Cell::stages; ++s)
        write(grads_.w_hh, Cell::recurrent[s], operand_width(layer_, s), loops_[0].weights().dw_hh(s),
              loops_[1].weights().dw_hh(s));
      const Real<T>* db =
          sum(loops_[0].weights().db(), loops_[1].weights().db(), Cell::gates * L, block);
      for (int slot = 0; slot < Cell::gates; ++slot) {
        const Vector<T> total = load(db + slot * L);
        const index to = Cell::weight_block[slot] * layer_.hidden + unit;
        if (grads_.b_ih && Cell::input.has(slot)) store_some(grads_.b_ih + to, total, units);
        for (Window w : Cell::recurrent)
          if (grads_.b_hh && w.has(slot)) store_some(grads_.b_hh + to, total, units);
      }
    }
    if (!grads_.w_hr.data) return;
    const Range outputs = share(blocks_of<T>(layer_.outputs), team.size, team.rank);
    for (index block = outputs.begin; block < outputs.end; ++block) {
      const index unit = block * L, units = layer_.outputs - unit < L ? layer_.outputs - unit : L;
      unpack_forward<Plain>(
          grads_.w_hr,
          sum(loops_[0].weights().dw_hr(), loops_[1].weights().dw_hr(), layer_.hidden * L, block),
          layer_.outputs, layer_.hidden, Plain::window, unit, units);
    }
  }

  // What the Ragged of a group points to.
  struct GroupRows {
    index *count = nullptr, *rows_before = nullptr, *order = nullptr;
  };

  const Layer<T> layer_;
  const Gradients<T> grads_;
  const index blocks_;
  Arena arena_;
  BackwardPanels<Cell, T> panels_;
  GroupRows group_rows_[2];
  BackwardLoop<Cell, T> loops_[2];
};

}  // namespace rnnfast::RNNFAST_TARGET
