// The batch sizes of a packed sequence, checked.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>
#include <vector>

#include "layer.h"
#include "tensor.h"

namespace rnnfast {

// The steps of a packed sequence, in the order of processing; see Steps.
struct Packing {
  Packing(const View& batch_sizes, bool reverse) {
    if (!batch_sizes) return;
    if (batch_sizes.dtype() != Dtype::int64 || batch_sizes.dims() != 1 || batch_sizes.size(0) < 1)
      throw pybind11::value_error(
          "batch_sizes must be int64 and have one dimension with at least one entry");
    const index steps = batch_sizes.size(0);
    const auto* sizes = static_cast<const std::int64_t*>(batch_sizes.data());
    for (index t = 0; t < steps; ++t) {
      count.push_back(sizes[t * batch_sizes.stride(0)]);
      first.push_back(rows);
      if (count[t] < 1 || (t > 0 && count[t] > count[t - 1]) ||
          __builtin_add_overflow(rows, count[t], &rows))
        throw pybind11::value_error("batch_sizes must be positive and never grow; entry " +
                                    std::to_string(t) + " is " + std::to_string(count[t]));
    }
    batch = count[0];
    if (reverse) {
      std::reverse(count.begin(), count.end());
      std::reverse(first.begin(), first.end());
    }
    before.push_back(0);
    for (index n : count) before.push_back(before.back() + n);
  }

  Steps steps() const {
    return count.empty() ? Steps{} : Steps{first.data(), count.data(), before.data()};
  }

  std::vector<index> first, count, before;
  index batch = 0, rows = 0;
};

}  // namespace rnnfast
