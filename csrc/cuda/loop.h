// What the time loops in both directions share: a block's place and its weights.
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
      : group_(launch), of_(group_.of), plan_(launch.plan) {}

  // The rows of W_hh that feed the block's gates, of every stage. Transposed, the rows of a product are
  // the units of h, and its sum runs over the block's own gates.
  template <bool transposed, int stage = 0>
  RNNFAST_INLINE void load() {
    if constexpr (stage < stages) {
      constexpr Window window = Cell::recurrent[stage];
      product_[stage].load(plan_.schedule[stage], [&](int m, int k) {
        const int own = transposed ? k : m, column = transposed ? m : k;
        const int number = own / plan_.units, j = group_.first_unit + own - number * plan_.units;
        if (number >= window.width() || j >= of_.hidden || column >= of_.hidden) return T{};
        const int row = weight_block<Cell, window.begin, window.end>(number) * of_.hidden + j;
        return of_.w_hh.data[row * of_.w_hh.row + column];
      });
      load<transposed, stage + 1>();
    }
  }

  Group<T> group_;
  const Recurrence<T>& of_;
  const Plan& plan_;
  Product<Engine, Engine::most_tiles / stages> product_[stages];
  int phase_ = 0;  // counts the stages of steps
};

}  // namespace rnnfast::cuda
