// Writes what kernels do not write in a padded batch whose rows differ in length: the steps past a
// row's end, and the final states of rows without a step.
#pragma once

#include <cstring>

#include "core/call.h"

namespace rnnfast {

// Zeros the steps past the ends of the rows.
template <class T>
void clear_past_ends(const Call& call, const View& view, index features) {
  const std::vector<index>& lengths = call.lengths[0].lengths();
  if (!view || lengths.empty()) return;
  const Sequence<T> sequence = call.sequence<T>(view);
  const auto bytes = static_cast<std::size_t>(features) * sizeof(T);
  for (index b = 0; b < call.batch; ++b)
    for (index t = lengths[static_cast<std::size_t>(b)]; t < call.steps; ++t)
      std::memset(sequence.data + t * sequence.step + b * sequence.row, 0, bytes);
}

// Copies the initial states of rows without a step to their final states.
template <class T>
void keep_states(const Call& call, const View& final, const View& initial, index features) {
  const std::vector<index>& lengths = call.lengths[0].lengths();
  if (!final || lengths.empty()) return;
  const auto bytes = static_cast<std::size_t>(features) * sizeof(T);
  for (int number = 0; number < call.all_directions; ++number) {
    const Matrix<T> to = state<T>(final, number);
    const Matrix<const T> from = state<const T>(initial, number);
    for (index b = 0; b < call.batch; ++b) {
      if (lengths[static_cast<std::size_t>(b)] > 0) continue;
      if (from.data)
        std::memcpy(to.data + b * to.row, from.data + b * from.row, bytes);
      else
        std::memset(to.data + b * to.row, 0, bytes);
    }
  }
}

}  // namespace rnnfast
