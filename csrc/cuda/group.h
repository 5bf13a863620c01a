// Which rows, units and steps a block computes, and how it waits for the other blocks of its group.
#pragma once

#include "cuda/layout.h"
#include "cuda/numbers.h"

namespace rnnfast::cuda {

// The address of numbers in the block's shared memory.
template <class S>
RNNFAST_INLINE S* shared(int offset) {
  return reinterpret_cast<S*>(shared_memory() + offset);
}

template <class T>
class Group {
 public:
  RNNFAST_INLINE explicit Group(const Launch<T>& launch)
      : plan(launch.plan),
        number_(block() / plan.blocks),
        rank(block() % plan.blocks),
        layer(launch.direction[number_ / plan.groups]),
        per_unit_(1.0f / static_cast<float>(plan.units)) {
    const int group = number_ % plan.groups;
    first_row = group * plan.rows;
    rows = min(plan.rows, layer.batch - first_row);
    first_unit = rank * plan.units;
    if (plan.tier == Tier::grid) {
      counter_ = launch.counters + number_;
      exchange =
          static_cast<unsigned char*>(launch.exchange) + number_ * (plan.exchange_bytes / plan.groups);
    }
  }

  static RNNFAST_INLINE int min(int a, int b) { return a < b ? a : b; }

  // The step that is number s in the order of processing.
  RNNFAST_INLINE int step(int s) const { return layer.reverse ? layer.steps - 1 - s : s; }

  // How many rows of the group step t has.
  RNNFAST_INLINE int active(int t) const {
    if (!layer.step_begin) return rows;
    const long n = layer.step_begin[t + 1] - layer.step_begin[t] - first_row;
    return n < 0 ? 0 : n < rows ? static_cast<int>(n) : rows;
  }

  // The features of row b of the group at step t.
  template <class S>
  RNNFAST_INLINE auto at(const S& sequence, int t, int b) const {
    const long row = first_row + b;
    return layer.step_begin ? sequence.data + (layer.step_begin[t] + row) * sequence.row
                            : sequence.data + t * sequence.step + row * sequence.row;
  }
  template <class M>
  RNNFAST_INLINE auto at(const M& matrix, int b) const {
    return matrix.data + (first_row + b) * matrix.row;
  }

  // Whether the states of row b are zero before step t.
  RNNFAST_INLINE bool cut(int t, int b) const {
    return layer.resets.data && *at(layer.resets, t, b) != 0;
  }

  // Waits for all blocks of the group; what they wrote before is then visible.
  RNNFAST_INLINE void sync() {
    if (plan.tier == Tier::block)
      sync_block();
    else if (plan.tier == Tier::cluster)
      sync_cluster();
    else
      meet();
  }

  // i / plan.units, in a tenth of the instructions of a division; exact below 2^20.
  RNNFAST_INLINE int over_units(int i) const {
    return static_cast<int>((static_cast<float>(i) + 0.5f) * per_unit_);
  }

  // Calls f(row, unit of the block) for the rows below `count`. The same thread always gets the same
  // row and unit.
  template <class F>
  RNNFAST_INLINE void for_units(int count, const F& f) const {
    for (int i = thread(); i < count * plan.units; i += threads()) {
      const int b = over_units(i);
      f(b, i - b * plan.units);
    }
  }

  const Plan& plan;

 private:
  const int number_;  // of the group, over both directions

 public:
  const int rank;
  const Recurrence<T>& layer;
  int first_row, rows, first_unit;
  unsigned char* exchange = nullptr;  // the group's part of Launch::exchange

 private:
  // Waits for the blocks of a group that exchanges through device memory.
  RNNFAST_INLINE void meet() {
    target_ += static_cast<unsigned>(plan.blocks);
    sync_block();
    if (thread() == 0) {
      count(counter_);
      wait_for(counter_, target_);
    }
    sync_block();
  }

  const float per_unit_;
  unsigned* counter_ = nullptr;
  unsigned target_ = 0;  // the counter's value after the last sync
};

template <class T, class Engine>
constexpr Sizes sizes() {
  return {sizeof(T), sizeof(Real<T>), Engine::depth, Engine::columns};
}

}  // namespace rnnfast::cuda
