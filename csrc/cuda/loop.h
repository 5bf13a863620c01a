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
      // Without a branch, so that many loads are in flight.
      product_[stage].load(plan_.schedule[stage], [&](int m, int k) {
        const int gate_row = transposed ? k : m, column = transposed ? m : k;
        const int number = group_.over_units(gate_row), hidden = layer_.hidden;
        const int j = group_.first_unit + gate_row - number * plan_.units;
        const bool exists = (number < window.width()) & (j < hidden) & (column < hidden);
        const int row = weight_block<Cell, window.begin, window.end>(number) * hidden + j;
        const T value = layer_.w_hh.data[exists ? row * layer_.w_hh.row + column : 0];
        return exists ? value : T{};
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
