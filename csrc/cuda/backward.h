// The reversed time loop of a group of blocks. In every stage of a step each block computes the
// gradients of its gates from those of its units' h, and multiplies them by its rows of the recurrent
// weights. It sends each block of the group the part of the product that belongs to that block's units.
// A block adds the parts in the order of blocks, so that the same call gives the same bits.
#pragma once

#include "cuda/loop.h"

namespace rnnfast::cuda {

template <class Cell, class T, class Engine>
class Backward : Loop<Cell, T, Engine> {
  using Base = Loop<Cell, T, Engine>;
  using Base::group_, Base::layer_, Base::plan_, Base::product_, Base::phase_, Base::stages,
      Base::has_c;
  using typename Base::V;

 public:
  RNNFAST_INLINE explicit Backward(const Launch<T>& launch)
      : Base(launch),
        layout_(plan_, info_of<Cell>(), sizes<T, Engine>()),
        inbox_size_(layout_.parcels * plan_.rows * plan_.units) {}

  RNNFAST_INLINE void run() {
    begin();
    int later = -1, later_active = 0;  // the step that was processed last, and its rows
    for (int s = layer_.steps - 1; s >= 0; --s) {
      const int t = group_.step(s), active = group_.active(t);
      if (active == 0 && later_active == 0) continue;
      for_stages<stages - 1>(t, active, later, later_active, s == 0 ? -1 : group_.step(s - 1));
      later = t;
      later_active = active;
    }
    end(later, later_active);
  }

 private:
  template <int stage>
  RNNFAST_INLINE void for_stages(int t, int active, int later, int later_active, int earlier) {
    if constexpr (stage >= 0) {
      apply<stage>(t, active, later, later_active, earlier);
      sync_block();
      ++phase_;
      multiply<stage>(active);
      group_.sync();
      for_stages<stage - 1>(t, active, later, later_active, earlier);
    }
  }

  // Applies the formula to the block's units, with the gradients that arrived for them.
  template <int stage>
  RNNFAST_INLINE void apply(int t, int active, int later, int later_active, int earlier) {
    constexpr Window window = Cell::recurrent[stage];
    constexpr int begin = window.begin, width = window.width();
    constexpr bool last = stage + 1 == stages;
    V *dh = shared<V>(layout_.dh), *dc = shared<V>(layout_.dc);
    T* operand = shared<T>(layout_.operand);
    const int rows = last && later_active > active ? later_active : active;
    group_.for_units(rows, [&](int b, int u) {
      const int j = group_.first_unit + u, i = b * plan_.units + u;
      if (j >= layer_.hidden) return;
      V grad;
      if constexpr (last) {
        if (b < later_active) arrive(dh[i], later, b, i);
        if (b >= active) return;
        grad = dh[i] + (layer_.dy.data ? widen(group_.at(layer_.dy, t, b)[j]) : V(0));
      } else {
        grad = arrived(stage + 1, i);
      }
      const bool cut = group_.cut(t, b);
      V s[Cell::slots] = {}, d[Cell::slots] = {};
      const T* gates = group_.at(layer_.gates, t, b) + j;
      for_slots<0, Cell::gates>(
          [&](auto slot) { s[slot.value] = widen(gates[slot.value * layer_.hidden]); });
      const V h0 = cut ? V(0) : state(layer_.y, layer_.h0, earlier, b, j);
      V c0 = 0, dc0 = 0, dh0 = last ? V(0) : dh[i];
      if constexpr (has_c) {
        s[Cell::cell_state] = group_.at(layer_.cell_states, t, b)[j];
        if (!cut) c0 = state(layer_.cell_states, layer_.c0, earlier, b, j);
        dc0 =
            dc[i] + (layer_.dcell_states.data ? widen(group_.at(layer_.dcell_states, t, b)[j]) : V(0));
      }
      T* dgates = group_.at(layer_.dgates, t, b) + j;
      if constexpr (!last)  // the gradients that the next stage wrote
        for_slots<0, Cell::gates>(
            [&](auto slot) { d[slot.value] = widen(dgates[slot.value * layer_.hidden]); });
      Cell::template backward<stage>(s, h0, c0, grad, d, dh0, dc0);
      for_slots<0, Cell::gates>(
          [&](auto slot) { dgates[slot.value * layer_.hidden] = narrow<T>(d[slot.value]); });
      for_slots<begin, begin + width>([&](auto slot) {
        operand[b * layout_.stride + (slot.value - begin) * plan_.units + u] = narrow<T>(d[slot.value]);
      });
      dh[i] = dh0;
      if constexpr (has_c) dc[i] = cut ? V(0) : dc0;
    });
  }

  // The state after step `earlier`, or the initial state where row b has no such step.
  template <class S, class M>
  RNNFAST_INLINE V state(const S& states, const M& initial, int earlier, int b, int j) const {
    if (earlier >= 0 && b < group_.active(earlier)) return widen(group_.at(states, earlier, b)[j]);
    return initial.data ? widen(group_.at(initial, b)[j]) : V(0);
  }

  // The sum of the parts that the products of `stage` sent for element i in the phase before.
  RNNFAST_INLINE V arrived(int stage, int i) const {
    const int state_size = plan_.rows * plan_.units;
    const int parcels = plan_.blocks * plan_.schedule[stage].pieces;
    const auto sum = [=](const V* from, const auto& load) {
      V total = 0;
      for (int parcel = 0; parcel < parcels; ++parcel, from += state_size) total += load(from);
      return total;
    };
    if (plan_.tier != Tier::grid)
      return sum(shared_inbox(phase_) + i, [](const V* from) { return *from; });
    const V* from = exchanged_inbox(phase_, group_.rank) + i;
    return sum(from, [](const V* from) { return load_fresh(from); });
  }

  // Completes the gradient of h before step `later`: adds the part that comes through the products.
  RNNFAST_INLINE void arrive(V& dh, int later, int b, int i) const {
    dh = group_.cut(later, b) ? V(0) : dh + arrived(0, i);
  }

  template <int stage>
  RNNFAST_INLINE void multiply(int active) {
    const int pieces = plan_.schedule[stage].pieces, width = exchanged_width(plan_);
    const int units = plan_.units, state_size = plan_.rows * units;
    const int first_parcel = group_.rank * pieces;
    // Once for all sums: of block 0 in device memory, or of this block.
    V* const inbox = plan_.tier == Tier::grid ? exchanged_inbox(phase_, 0) : shared_inbox(phase_);
    const auto put = [=, this](int piece, int m, int column, const auto& sums) {
      if (m >= width) return;
      const int to = group_.over_units(m), u = m - to * units;
      V* parcel = plan_.tier == Tier::cluster ? shared_of(inbox, to)
                                              : inbox + static_cast<long>(to) * inbox_size_;
      parcel += (first_parcel + piece) * state_size + column * units + u;
      for (const V sum : sums) {
        if (column++ < active) *parcel = sum;
        parcel += units;
      }
    };
    product_[stage].multiply(shared<T>(layout_.operand), layout_.stride, active, put);
  }

  // Where a block receives the parts of a phase: in its shared memory, or in device memory.
  RNNFAST_INLINE V* shared_inbox(int phase) const {
    return shared<V>(layout_.inbox) + (phase & 1) * inbox_size_;
  }
  RNNFAST_INLINE V* exchanged_inbox(int phase, int rank) const {
    return reinterpret_cast<V*>(group_.exchange) +
           static_cast<long>((phase & 1) * plan_.blocks + rank) * inbox_size_;
  }

  RNNFAST_INLINE void begin() {
    const int rows = round_up(plan_.rows, Engine::columns);
    T* operand = shared<T>(layout_.operand);
    for (int i = thread(); i < rows * layout_.stride; i += threads()) operand[i] = T{};
    this->template load<true>();
    V *dh = shared<V>(layout_.dh), *dc = shared<V>(layout_.dc);
    group_.for_units(group_.rows, [&](int b, int u) {
      const int j = group_.first_unit + u, i = b * plan_.units + u;
      const bool exists = j < layer_.hidden;
      dh[i] = exists && layer_.dh_n.data ? widen(group_.at(layer_.dh_n, b)[j]) : V(0);
      if constexpr (has_c)
        dc[i] = exists && layer_.dc_n.data ? widen(group_.at(layer_.dc_n, b)[j]) : V(0);
    });
    group_.sync();  // no block may send before all blocks have started
  }

  RNNFAST_INLINE void end(int later, int later_active) {
    V *dh = shared<V>(layout_.dh), *dc = shared<V>(layout_.dc);
    group_.for_units(group_.rows, [&](int b, int u) {
      const int j = group_.first_unit + u, i = b * plan_.units + u;
      if (j >= layer_.hidden) return;
      if (b < later_active) arrive(dh[i], later, b, i);
      if (layer_.dh0.data) group_.at(layer_.dh0, b)[j] = narrow<T>(dh[i]);
      if constexpr (has_c)
        if (layer_.dc0.data) group_.at(layer_.dc0, b)[j] = narrow<T>(dc[i]);
    });
  }

  const BackwardLayout layout_;
  const int inbox_size_;  // in numbers
};

}  // namespace rnnfast::cuda
