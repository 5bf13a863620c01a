// What the forward and the backward time loop share: the block's group and its weights.
#pragma once

#include "cuda/group.h"
#include "cuda/product.h"

namespace rnnfast::cuda {

template <class Cell, class T, class Engine>
class Loop {
 protected:
  using V = Real<T>;
  static constexpr int stages = Cell::stages;
  static constexpr bool has_c = Cell::cell_state >= 0;

  RNNFAST_INLINE explicit Loop(const Launch<T>& launch)
      : group_(launch), layer_(group_.layer), plan_(launch.plan) {}

  // Loads the rows of W_hh that feed the block's gates, for every stage. Where `transposed`, the rows
  // of a product are the units of h, and its sum runs over the block's gates.
  template <bool transposed, int stage = 0>
  RNNFAST_INLINE void load() {
    if constexpr (stage < stages) {
      constexpr Window window = Cell::recurrent[stage];
      product_[stage].load(plan_.schedule[stage], [&](int m, int k) {
        const int gate_row = transposed ? k : m, column = transposed ? m : k;
        const int number = gate_row / plan_.units;
        const int j = group_.first_unit + gate_row - number * plan_.units;
        if (number >= window.width() || j >= layer_.hidden || column >= layer_.hidden) return T{};
        const int row = weight_block<Cell, window.begin, window.end>(number) * layer_.hidden + j;
        return layer_.w_hh.data[row * layer_.w_hh.row + column];
      });
      load<transposed, stage + 1>();
    }
  }

  Group<T> group_;
  const Recurrence<T>& layer_;
  const Plan& plan_;
  Product<Engine, Engine::most_tiles / stages> product_[stages];
  int phase_ = 0;  // the number of stages done, over all steps
};

}  // namespace rnnfast::cuda
