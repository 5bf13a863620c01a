// The time loop of a group of blocks. In every stage of a step each block multiplies its rows of the
// recurrent weights, which stay in its registers, by the group's operand: h, or what the stage before
// returned. Then each block applies the cell to its units, and publishes the results as its part of the
// next operand.
#pragma once

#include "cuda/loop.h"

namespace rnnfast::cuda {

template <class Cell, class T, class Engine>
class Forward : Loop<Cell, T, Engine> {
  using Base = Loop<Cell, T, Engine>;
  using Base::group_, Base::layer_, Base::plan_, Base::product_, Base::phase_, Base::stages,
      Base::has_c;
  using typename Base::V;

 public:
  RNNFAST_INLINE explicit Forward(const Launch<T>& launch)
      : Base(launch), layout_(plan_, info_of<Cell>(), sizes<T, Engine>(), layer_.hidden) {}

  RNNFAST_INLINE void run() {
    begin();
    for (int s = 0; s < layer_.steps; ++s) {
      const int t = group_.step(s), active = group_.active(t);
      if (active > 0) for_stages<0>(t, active);
    }
    end();
  }

 private:
  template <int stage>
  RNNFAST_INLINE void for_stages(int t, int active) {
    if constexpr (stage < stages) {
      for (int from = 0; from < active; from += plan_.chunk) {
        const int count = group_.min(active - from, plan_.chunk);
        take_operand(from, count);
        multiply<stage>(count);
        sync_block();
        apply<stage>(t, from, count);
        sync_block();
      }
      ++phase_;
      publish(active);
      group_.sync();
      for_stages<stage + 1>(t, active);
    }
  }

  template <int stage>
  RNNFAST_INLINE void multiply(int count) {
    const T* operand = shared<T>(layout_.operands) + buffer() * layout_.buffer;
    const int units = plan_.units, columns = layout_.columns;
    constexpr int rows = Cell::recurrent[stage].width();
    V* partial = shared<V>(layout_.partial);
    const auto put = [=](int piece, int m, int column, const auto& sums) {
      if (m >= rows * units) return;
      V* to = partial + (piece * rows * units + m) * columns + column;
      for (const V sum : sums) *to++ = sum;
    };
    product_[stage].multiply(operand, layout_.stride, count, put);
  }

  // Applies the cell's formula to the block's units, for `count` rows whose products are in `partial`.
  template <int stage>
  RNNFAST_INLINE void apply(int t, int from, int count) {
    constexpr Window window = Cell::recurrent[stage];
    constexpr int width = window.width(), begin = window.begin;
    const int state_size = plan_.rows * plan_.units, pieces = plan_.schedule[stage].pieces;
    const int gate_size = plan_.units * layout_.columns;
    const V *partial = shared<V>(layout_.partial), *bias = shared<V>(layout_.bias);
    V *h = shared<V>(layout_.h), *c = shared<V>(layout_.c), *kept = shared<V>(layout_.kept);
    T* outgoing = shared<T>(layout_.outgoing);
    group_.for_units(count, [&](int column, int u) {
      const int b = from + column, j = group_.first_unit + u, i = b * plan_.units + u;
      if (j >= layer_.hidden) return;
      const bool cut = group_.cut(t, b);
      V s[Cell::slots] = {};
      if constexpr (stage == 0) {
        const T* products = group_.at(layer_.products, t, b) + j;
        for_slots<Cell::input.begin, Cell::input.end>([&](auto slot) {
          constexpr int block = Cell::weight_block[slot.value];
          s[slot.value] = widen(products[block * layer_.hidden]);
        });
      } else {
        for_slots<0, Cell::slots>(
            [&](auto slot) { s[slot.value] = kept[slot.value * state_size + i]; });
      }
      const V* first = partial + u * layout_.columns + column;
      for_slots<begin, begin + width>([&](auto slot) {
        const V* from = first + (slot.value - begin) * gate_size;
        V sum = 0;
        for (int piece = 0; piece < pieces; ++piece, from += width * gate_size) sum += *from;
        s[slot.value] += bias[slot.value * plan_.units + u] + (cut ? V(0) : sum);
      });
      const V h0 = cut ? V(0) : h[i], c0 = !has_c || cut ? V(0) : c[i];
      const V result = Cell::template forward<stage>(s, h0, c0);
      outgoing[i] = narrow<T>(result);
      if constexpr (stage + 1 < stages) {
        for_slots<0, Cell::slots>(
            [&](auto slot) { kept[slot.value * state_size + i] = s[slot.value]; });
      } else {
        h[i] = result;
        group_.at(layer_.y, t, b)[j] = outgoing[i];
        if constexpr (has_c) {
          c[i] = s[Cell::cell_state];
          if (layer_.cell_states.data) group_.at(layer_.cell_states, t, b)[j] = c[i];
        }
        if (layer_.gates.data) {
          T* gates = group_.at(layer_.gates, t, b) + j;
          for_slots<0, Cell::gates>(
              [&](auto slot) { gates[slot.value * layer_.hidden] = narrow<T>(s[slot.value]); });
        }
      }
    });
  }

  RNNFAST_INLINE void begin() {
    T* operands = shared<T>(layout_.operands);
    const int buffers = plan_.tier == Tier::grid ? 1 : 2;
    for (int i = thread(); i < buffers * layout_.buffer; i += threads()) operands[i] = T{};
    this->template load<false>();
    V *h = shared<V>(layout_.h), *c = shared<V>(layout_.c), *bias = shared<V>(layout_.bias);
    T* outgoing = shared<T>(layout_.outgoing);
    for (int i = thread(); i < Cell::gates * plan_.units; i += threads()) bias[i] = 0;
    sync_block();
    if (layer_.b_hh) load_biases<0>(bias);
    group_.for_units(plan_.rows, [&](int b, int u) {
      const int j = group_.first_unit + u, i = b * plan_.units + u;
      const bool exists = b < group_.rows && j < layer_.hidden;
      h[i] = exists && layer_.h0.data ? widen(group_.at(layer_.h0, b)[j]) : V(0);
      if constexpr (has_c) c[i] = exists && layer_.c0.data ? widen(group_.at(layer_.c0, b)[j]) : V(0);
      outgoing[i] = narrow<T>(h[i]);
    });
    // In a cell of one stage every step reads h, from alternate buffers. Rows of a reversed packed
    // sequence may begin at any step, so both buffers need the initial h. This block's zeros must be
    // written before another block's h.
    group_.sync();
    for (phase_ = stages == 1 ? 1 : 2; phase_ <= 2; ++phase_) publish(plan_.rows);
    phase_ = 0;
    group_.sync();
  }

  template <int stage>
  RNNFAST_INLINE void load_biases(V* bias) {
    if constexpr (stage < stages) {
      constexpr Window window = Cell::recurrent[stage];
      for (int i = thread(); i < window.width() * plan_.units; i += threads()) {
        const int number = i / plan_.units, u = i - number * plan_.units, j = group_.first_unit + u;
        const int block = weight_block<Cell, window.begin, window.end>(number);
        if (j < layer_.hidden)
          bias[(window.begin + number) * plan_.units + u] =
              widen(layer_.b_hh[block * layer_.hidden + j]);
      }
      load_biases<stage + 1>(bias);
    }
  }

  RNNFAST_INLINE void end() {
    const V *h = shared<V>(layout_.h), *c = shared<V>(layout_.c);
    group_.for_units(group_.rows, [&](int b, int u) {
      const int j = group_.first_unit + u, i = b * plan_.units + u;
      if (j >= layer_.hidden) return;
      if (layer_.h_n.data) group_.at(layer_.h_n, b)[j] = narrow<T>(h[i]);
      if constexpr (has_c)
        if (layer_.c_n.data) group_.at(layer_.c_n, b)[j] = narrow<T>(c[i]);
    });
  }

  // Copies the block's part of the next operand to all blocks that read it, 16 bytes at a time.
  RNNFAST_INLINE void publish(int active) {
    constexpr int numbers = sizeof(Words) / sizeof(T);
    const int chunks = plan_.units / numbers, copy_chunks = active * chunks;
    const auto* outgoing = reinterpret_cast<const Words*>(shared<T>(layout_.outgoing));
    const int copies = plan_.tier == Tier::cluster ? plan_.blocks : 1;
    for (int i = thread(); i < copies * copy_chunks; i += threads()) {
      const int copy = i / copy_chunks, chunk = i - copy * copy_chunks;
      const int b = chunk / chunks, k = chunk - b * chunks;
      T* to;
      if (plan_.tier == Tier::grid) {
        to = exchanged_operand() + b * exchanged_width(plan_);
      } else {
        to = shared<T>(layout_.operands) + buffer() * layout_.buffer + b * layout_.stride;
        if (plan_.tier == Tier::cluster) to = shared_of(to, copy);
      }
      reinterpret_cast<Words*>(to + group_.first_unit)[k] = outgoing[b * chunks + k];
    }
  }

  // Copies the operand to shared memory where it is in device memory.
  RNNFAST_INLINE void take_operand(int begin, int count) {
    if (plan_.tier != Tier::grid) return;
    constexpr int numbers = sizeof(Words) / sizeof(T);
    const int chunks = exchanged_width(plan_) / numbers;
    const auto* from = reinterpret_cast<const Words*>(exchanged_operand()) + begin * chunks;
    T* to = shared<T>(layout_.operands);
    for (int i = thread(); i < count * chunks; i += threads()) {
      const int b = i / chunks, k = i - b * chunks;
      reinterpret_cast<Words*>(to + b * layout_.stride)[k] = load_fresh(from + i);
    }
    sync_block();
  }

  // The operand of this phase in device memory: [rows][exchanged width].
  RNNFAST_INLINE T* exchanged_operand() {
    return reinterpret_cast<T*>(group_.exchange) +
           (phase_ & 1) * static_cast<long>(plan_.rows) * exchanged_width(plan_);
  }

  RNNFAST_INLINE int buffer() const { return plan_.tier == Tier::grid ? 0 : phase_ & 1; }

  const ForwardLayout layout_;
};

}  // namespace rnnfast::cuda
