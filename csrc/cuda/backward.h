// The reversed time loop of a group of blocks. In every stage of a step each block turns the gradients
// of its own units' h into those of their gates, multiplies these by its rows of the recurrent weights,
// and sends every block of the group the part that belongs to that one's units. Parts are added in the
// order of blocks, so that the same call gives the same bits.
#pragma once

#include "cuda/loop.h"

namespace rnnfast::cuda {

template <class Cell, class T, class Engine>
class Backward : Loop<Cell, T, Engine> {
  using Base = Loop<Cell, T, Engine>;
  using Base::group_, Base::of_, Base::plan_, Base::product_, Base::phase_, Base::stages, Base::has_c;
  using typename Base::V;

 public:
  RNNFAST_INLINE explicit Backward(const Launch<T>& launch)
      : Base(launch), layout_(plan_, info_of<Cell>(), sizes<T, Engine>()) {}

  RNNFAST_INLINE void run() {
    begin();
    int later = -1, later_active = 0;  // the step before this one in backward's order
    for (int s = of_.steps - 1; s >= 0; --s) {
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

  // The formula on the block's own units, from what arrived for them.
  template <int stage>
  RNNFAST_INLINE void apply(int t, int active, int later, int later_active, int earlier) {
    constexpr Window window = Cell::recurrent[stage];
    constexpr int begin = window.begin, width = window.width();
    constexpr bool last = stage + 1 == stages;
    V *dh = shared<V>(layout_.dh), *dc = shared<V>(layout_.dc);
    T* operand = shared<T>(layout_.operand);
    const int rows = last && later_active > active ? later_active : active;
    group_.for_own(rows, [&](int b, int u) {
      const int j = group_.first_unit + u, i = b * plan_.units + u;
      if (j >= of_.hidden) return;
      V grad;
      if constexpr (last) {
        if (b < later_active) arrive(dh[i], later, b, i);
        if (b >= active) return;
        grad = dh[i] + (of_.dy.data ? widen(group_.at(of_.dy, t, b)[j]) : V(0));
      } else {
        grad = arrived(stage + 1, i);
      }
      const bool cut = group_.cut(t, b);
      V s[Cell::slots] = {}, d[Cell::slots] = {};
      const T* gates = group_.at(of_.gates, t, b) + j;
      for_slots<0, Cell::gates>(
          [&](auto slot) { s[slot.value] = widen(gates[slot.value * of_.hidden]); });
      const V h0 = cut ? V(0) : state(of_.y, of_.h0, earlier, b, j);
      V c0 = 0, dc0 = 0, dh0 = last ? V(0) : dh[i];
      if constexpr (has_c) {
        s[Cell::cell_state] = group_.at(of_.cell_states, t, b)[j];
        if (!cut) c0 = state(of_.cell_states, of_.c0, earlier, b, j);
        dc0 = dc[i] + (of_.dcell_states.data ? widen(group_.at(of_.dcell_states, t, b)[j]) : V(0));
      }
      T* dgates = group_.at(of_.dgates, t, b) + j;
      if constexpr (!last)  // what the stage after has found
        for_slots<0, Cell::gates>(
            [&](auto slot) { d[slot.value] = widen(dgates[slot.value * of_.hidden]); });
      Cell::template backward<stage>(s, h0, c0, grad, d, dh0, dc0);
      for_slots<0, Cell::gates>(
          [&](auto slot) { dgates[slot.value * of_.hidden] = narrow<T>(d[slot.value]); });
      for_slots<begin, begin + width>([&](auto slot) {
        operand[b * layout_.stride + (slot.value - begin) * plan_.units + u] = narrow<T>(d[slot.value]);
      });
      dh[i] = dh0;
      if constexpr (has_c) dc[i] = cut ? V(0) : dc0;
    });
  }

  // The state before the step that follows `earlier`; none: before the first.
  template <class S, class M>
  RNNFAST_INLINE V state(const S& after, const M& initial, int earlier, int b, int j) const {
    if (earlier >= 0 && b < group_.active(earlier)) return widen(group_.at(after, earlier, b)[j]);
    return initial.data ? widen(group_.at(initial, b)[j]) : V(0);
  }

  // Of unit i's gradients, the parts that the products of the phase before have sent, of `stage`.
  RNNFAST_INLINE V arrived(int stage, int i) const {
    const int own = plan_.rows * plan_.units;
    const int parcels = plan_.blocks * plan_.schedule[stage].pieces;
    const V* from = inbox(group_.rank, phase_) + i;
    V sum = 0;
    for (int parcel = 0; parcel < parcels; ++parcel)
      sum += plan_.tier == Tier::grid ? load_fresh(from + parcel * own) : from[parcel * own];
    return sum;
  }

  // The gradient of h before step `later` is complete: what the formula and what the products say.
  RNNFAST_INLINE void arrive(V& dh, int later, int b, int i) const {
    dh = group_.cut(later, b) ? V(0) : dh + arrived(0, i);
  }

  template <int stage>
  RNNFAST_INLINE void multiply(int active) {
    const int own = plan_.rows * plan_.units, units = plan_.units, rank = group_.rank;
    const int pieces = plan_.schedule[stage].pieces, all = exchanged_width(plan_);
    product_[stage].multiply(
        shared<T>(layout_.operand), layout_.stride, active, [=, this](int piece, int m, int b, V sum) {
          if (m >= all || b >= active) return;
          const int to = group_.over_units(m);
          inbox(to, phase_)[(rank * pieces + piece) * own + b * units + m - to * units] = sum;
        });
  }

  // Where what is sent to a block in a phase arrives.
  RNNFAST_INLINE V* inbox(int rank, int phase) const {
    const long size = static_cast<long>(layout_.parcels) * plan_.rows * plan_.units;
    if (plan_.tier == Tier::grid)
      return reinterpret_cast<V*>(group_.exchange) + ((phase & 1) * plan_.blocks + rank) * size;
    V* own = shared<V>(layout_.inbox) + (phase & 1) * size;
    return plan_.tier == Tier::cluster ? shared_of(own, rank) : own;
  }

  RNNFAST_INLINE void begin() {
    const int rows = round_up(plan_.rows, Engine::columns);
    T* operand = shared<T>(layout_.operand);
    for (int i = thread(); i < rows * layout_.stride; i += threads()) operand[i] = T{};
    this->template load<true>();
    V *dh = shared<V>(layout_.dh), *dc = shared<V>(layout_.dc);
    group_.for_own(group_.rows, [&](int b, int u) {
      const int j = group_.first_unit + u, i = b * plan_.units + u;
      const bool there = j < of_.hidden;
      dh[i] = there && of_.dh_n.data ? widen(group_.at(of_.dh_n, b)[j]) : V(0);
      if constexpr (has_c) dc[i] = there && of_.dc_n.data ? widen(group_.at(of_.dc_n, b)[j]) : V(0);
    });
    group_.sync();  // no block sends before all are there
  }

  RNNFAST_INLINE void end(int later, int later_active) {
    V *dh = shared<V>(layout_.dh), *dc = shared<V>(layout_.dc);
    group_.for_own(group_.rows, [&](int b, int u) {
      const int j = group_.first_unit + u, i = b * plan_.units + u;
      if (j >= of_.hidden) return;
      if (b < later_active) arrive(dh[i], later, b, i);
      if (of_.dh0.data) group_.at(of_.dh0, b)[j] = narrow<T>(dh[i]);
      if constexpr (has_c)
        if (of_.dc0.data) group_.at(of_.dc0, b)[j] = narrow<T>(dc[i]);
    });
  }

  const BackwardLayout layout_;
};

}  // namespace rnnfast::cuda
