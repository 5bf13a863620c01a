// Backward of a whole layer: packs the weights, runs the reversed loop over groups of rows, and adds up
// what the groups found.
//
// A large batch is cut into two groups, which share nothing until their weight gradients are added at
// the end. Two threads then meet once a call rather than twice a chunk, and no gradient of a gate has
// to travel from one core's cache to another's. Weights too large for two copies of their gradients to
// stay in the caches are not worth it. The cut depends on the layer's sizes alone, so that sums have
// one order for any team.
#pragma once

#include "backward_loop.h"

namespace rnnfast::RNNFAST_TARGET {

template <class Cell, class T>
class Backward {
 public:
  // From a null base it only counts the scratch memory.
  Backward(const Layer<T>& layer, const Gradients<T>& grads, void* base)
      : layer_(layer),
        grads_(grads),
        blocks_(blocks_of<T>(layer.hidden)),
        arena_(base),
        panels_(take_panels()),
        loops_{loop(0), loop(1)} {}

  index scratch() const { return arena_.used(); }

  static int groups(const Layer<T>& layer) {
    constexpr index enough_rows = 512, least = 8;
    const bool worth = layer.steps * layer.batch >= enough_rows && layer.batch >= least &&
                       BackwardLoop<Cell, T>::weight_bytes(layer) <= l2_bytes;
    return worth && !layer.ragged.count ? 2 : 1;
  }

  void run(const Team& team) {
    const FlushDenormals guard;
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

  // Numbers in one panel of each kind.
  index stage_size(int s) const { return AllPanels::size(blocks_, Cell::recurrent[s].width()); }
  index input_size() const { return AllPanels::size(blocks_, Cell::input.width()); }
  index projection_size() const { return AllPanels::size(blocks_of<T>(layer_.outputs), 1); }

  BackwardPanels<Cell, T> take_panels() {
    BackwardPanels<Cell, T> panels;
    const index columns = blocks_of<T>(layer_.inputs);
    for (int s = 0; s < Cell::stages; ++s)
      panels.stage[s] = arena_.template take<T>(blocks_of<T>(operand_width(layer_, s)) * stage_size(s));
    panels.input = arena_.template take<T>(grads_.x.data ? columns * input_size() : 0);
    panels.projection =
        arena_.template take<T>(is_projected<Cell>(layer_) ? blocks_ * projection_size() : 0);
    panels.zeros = arena_.template take<Real<T>>(zeros_of(layer_));
    return panels;
  }

  // The loop over group k; where there is no such group, one that owns no memory and never runs.
  BackwardLoop<Cell, T> loop(int k) {
    const int n = groups(layer_);
    Arena none(nullptr);
    const Range rows = share(layer_.batch, n, k < n ? k : 0);
    const auto own = [&](auto s) {
      if (s.data) s.data += rows.begin * s.row;
      return s;
    };
    Layer<T> layer = layer_;
    layer.batch = rows.size();
    layer.x = own(layer.x);
    layer.y = own(layer.y);
    layer.resets = own(layer.resets);
    layer.h0 = own(layer.h0);
    layer.c0 = own(layer.c0);
    layer.saved += rows.begin * Cell::slots * L;
    Gradients<T> grads = grads_;
    grads.y = own(grads.y);
    grads.cells = own(grads.cells);
    grads.x = own(grads.x);
    grads.h_n = own(grads.h_n);
    grads.c_n = own(grads.c_n);
    grads.h0 = own(grads.h0);
    grads.c0 = own(grads.c0);
    return {layer, grads, layer_.batch, panels_, k < n ? arena_ : none};
  }

  void pack(const Team& team) {
    // A share of the blocks of `columns` columns of a matrix.
    const auto own = [&](index columns, auto pack_block) {
      const Range blocks = share(blocks_of<T>(columns), team.size, team.rank);
      for (index block = blocks.begin; block < blocks.end; ++block)
        pack_block(block, block * L, columns - block * L);
    };
    for (int s = 0; s < Cell::stages; ++s)
      own(operand_width(layer_, s), [&](index block, index column, index columns) {
        pack_backward<Cell>(panels_.stage[s] + block * stage_size(s), layer_.w_hh, layer_.hidden,
                            Cell::recurrent[s], column, columns);
      });
    if (grads_.x.data)
      own(layer_.inputs, [&](index block, index column, index columns) {
        pack_backward<Cell>(panels_.input + block * input_size(), layer_.w_ih, layer_.hidden,
                            Cell::input, column, columns);
      });
    if (is_projected<Cell>(layer_))
      own(layer_.hidden, [&](index block, index column, index columns) {
        pack_backward<Plain>(panels_.projection + block * projection_size(), layer_.w_hr,
                             layer_.outputs, Plain::all, column, columns);
      });
    if (team.rank == 0)
      for (index k = 0; k < zeros_of(layer_); ++k) panels_.zeros[k] = 0;
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
          layer_.outputs, layer_.hidden, Plain::all, unit, units);
    }
  }

  const Layer<T> layer_;
  const Gradients<T> grads_;
  const index blocks_;
  Arena arena_;
  BackwardPanels<Cell, T> panels_;
  BackwardLoop<Cell, T> loops_[2];
};

}  // namespace rnnfast::RNNFAST_TARGET
