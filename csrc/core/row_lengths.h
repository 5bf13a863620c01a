// The lengths of the rows of a batch, checked: from the batch sizes of a packed sequence, or from the
// lengths of the rows of a padded batch.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/layer.h"
#include "core/view.h"

namespace rnnfast {

// Owns what a Ragged points to. Empty where every row has every step.
class RowLengths {
 public:
  RowLengths() = default;

  static RowLengths of_batch_sizes(const View& sizes) {
    if (sizes.dtype() != Dtype::int64 || sizes.dims() != 1 || sizes.size(0) < 1)
      throw std::invalid_argument(
          "batch_sizes must be int64 and have one dimension with at least one entry");
    RowLengths result;
    for (index t = 0; t < sizes.size(0); ++t) {
      const index count = entry(sizes, t);
      if (count < 1 || (t > 0 && count > result.count_.back()) || !result.add_step(count))
        throw std::invalid_argument("batch_sizes must be positive and never grow; entry " +
                                    std::to_string(t) + " is " + std::to_string(count));
    }
    result.finish();
    return result;
  }

  static RowLengths of_lengths(const View& lengths, index batch, index steps) {
    if (lengths.dtype() != Dtype::int64 || lengths.dims() != 1 || lengths.size(0) != batch)
      throw std::invalid_argument("lengths has shape " + lengths.shape_text() + " and dtype " +
                                  lengths.dtype_name() + "; expected (" + std::to_string(batch) +
                                  ",) and int64");
    RowLengths result;
    index longest = 0;
    for (index b = 0; b < batch; ++b) {
      const index length = entry(lengths, b);
      if (length < 0 || length > steps)
        throw std::runtime_error("Length of all samples has to be between 0 and the " +
                                 std::to_string(steps) + " steps of the input, but lengths[" +
                                 std::to_string(b) + "] is " + std::to_string(length));
      longest = std::max(longest, length);
      result.lengths_.push_back(length);
    }
    // longer[n]: how many rows have more than n steps; then, the place of the next row with n steps.
    std::vector<index> longer(static_cast<std::size_t>(longest) + 1);
    for (index length : result.lengths_)
      if (length > 0) ++longer[length - 1];
    for (index n = longest - 1; n > 0; --n) longer[n - 1] += longer[n];
    for (index t = 0; t < std::max(longest, index{1}); ++t) result.add_step(longer[t]);
    result.order_.resize(static_cast<std::size_t>(batch));
    for (index b = 0; b < batch; ++b) result.order_[longer[result.lengths_[b]]++] = b;
    result.finish();
    return result;
  }

  RowLengths reversed() const {
    RowLengths other = *this;
    std::reverse(other.count_.begin(), other.count_.end());
    std::reverse(other.first_row_.begin(), other.first_row_.end());
    other.finish();
    return other;
  }

  Ragged ragged() const {
    if (count_.empty()) return {};
    const bool padded = !order_.empty();
    return {first_row_.data(), count_.data(), rows_before_.data(), padded ? order_.data() : nullptr,
            padded ? nullptr : first_row_.data()};
  }

  index steps() const { return static_cast<index>(count_.size()); }
  index batch() const { return *std::max_element(count_.begin(), count_.end()); }
  index rows() const { return rows_; }
  // The lengths of the rows of a padded batch; empty otherwise.
  const std::vector<index>& lengths() const { return lengths_; }

 private:
  static index entry(const View& view, index k) {
    return static_cast<const std::int64_t*>(view.data())[k * view.stride(0)];
  }

  // False where the number of rows overflows.
  bool add_step(index count) {
    first_row_.push_back(rows_);
    count_.push_back(count);
    return !__builtin_add_overflow(rows_, count, &rows_);
  }

  void finish() {
    rows_before_.assign(1, 0);
    for (index n : count_) rows_before_.push_back(rows_before_.back() + n);
  }

  std::vector<index> first_row_, count_, rows_before_, order_, lengths_;
  index rows_ = 0;
};

}  // namespace rnnfast
