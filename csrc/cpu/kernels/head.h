// The end of a model that chooses among classes: one product for the scores, and the vector work of a
// softmax.
#pragma once

#include "cpu/kernels/parallel.h"
#include "cpu/kernels/product.h"

namespace rnnfast::RNNFAST_TARGET {

template <class T>
class HeadProduct {
 public:
  explicit HeadProduct(const Head<T>& head)
      : head_(head), blocks_(blocks_of<T>(head.classes)), shape_(1, head.depth) {
    Arena arena(head.packed);
    bias_ = arena.template take<Real<T>>(blocks_ * L);
    panels_ = arena.template take<Operand<T>>(blocks_ * shape_.size);
    packed_bytes_ = arena.used();
  }

  index packed_bytes() const { return packed_bytes_; }
  index width() const { return blocks_ * L; }

  void pack() const {
    for (index block = 0; block < blocks_; ++block) {
      const index left = head_.classes - block * L, classes = left < L ? left : L;
      pack_forward<Plain>(panels_ + block * shape_.size, head_.w, head_.classes, head_.depth,
                          Plain::window, block * L, classes);
      for (index k = 0; k < L; ++k)
        bias_[block * L + k] = k >= classes ? -infinity
                               : head_.bias ? static_cast<Real<T>>(widen(head_.bias[block * L + k]))
                                            : 0;
    }
  }

  // Bytes of scratch for one part of the product.
  index scratch() const {
    return needs_padding<T>(head_.depth)
               ? padded_rows<T>(head_.rows) * padded_width<T>(head_.depth) * index{sizeof(Operand<T>)}
               : 0;
  }

  // The scores of part `part` of the classes, of `parts` parts.
  void multiply(int part, int parts, void* scratch) const {
    const FlushDenormals guard;
    const MatrixUnit<on_matrix_unit<T>> unit;
    const index padded = padded_width<T>(head_.depth);
    Operand<T>* const copies = static_cast<Operand<T>*>(scratch);
    const bool copied = needs_padding<T>(head_.depth);
    const auto row_of_x = [&](index row) { return head_.x.data + head_.chosen[row] * head_.x.row; };
    for (index row = 0; copied && row < head_.rows; ++row)
      pad_row<T>(copies + row * padded, row_of_x(row), head_.depth);
    const auto operand = [&](index row) -> const Operand<T>* {
      if constexpr (!on_matrix_unit<T>)
        if (!copied) return row_of_x(row);
      return copies + row * padded;
    };
    const Extent extent{contiguous<T>(head_.depth), shape_.size, shape_.step, L, L, shape_.gate};
    for_each_tile<T, 1>(head_.rows, share(blocks_, parts, part), false,
                        [&](index row, int rows, index block, int, TileFunction<T> tile) {
                          const Operand<T>* a[tile_rows<T>];
                          Real<T>* c[tile_rows<T>];
                          for (int r = 0; r < rows; ++r) {
                            a[r] = operand(row + r);
                            c[r] = head_.scores + head_.chosen[row + r] * width() + block * L;
                          }
                          tile(a, panels_ + block * shape_.size, c, bias_ + block * L, extent);
                        });
  }

 private:
  static constexpr int L = lanes<T>;
  static constexpr Real<T> infinity = __builtin_inf();

  const Head<T> head_;
  const index blocks_;
  const PanelShape<T> shape_;
  Real<T>* bias_;       // [blocks][lanes]; -infinity past the classes
  Operand<T>* panels_;  // [blocks][k][lanes], see product.h
  index packed_bytes_;
};

// --- softmax: rows of scores of whole vectors --------------------------------------------------------

// The largest score. A NaN counts as none.
template <class R>
R highest(const R* scores, index width) {
  constexpr int L = lanes<R>;
  Vector<R> most = splat<Vector<R>>(-__builtin_inf());
  for (index k = 0; k < width; k += L) {
    const Vector<R> v = load(scores + k);
    most = where_less(most, v, v, most);
  }
  R result = most[0];
  for (int lane = 1; lane < L; ++lane) result = most[lane] > result ? most[lane] : result;
  return result;
}

// weights[k] = exp(scale * (scores[k] - highest)), exactly 0 where that is below the smallest normal
// number. Returns their sum, which is NaN where a score is NaN or +infinity, or all are -infinity.
// Writes no weights where `weights` is null.
template <class R>
R weigh(const R* scores, index width, R highest, R scale, R* weights) {
  using V = Vector<R>;
  constexpr int L = lanes<R>;
  const V lowest = splat<V>(Constants<R>::lowest), factor = splat<V>(scale), zero{};
  V sum{};
  for (index k = 0; k < width; k += L) {
    const V x = (load(scores + k) - splat<V>(highest)) * factor;
    const Exp<V> e = exp_parts(at_least(x, lowest));
    const V weight = where_less(x, lowest, zero, fma(e.scale, e.m, e.scale));
    if (weights) store(weights + k, weight);
    sum += weight;
  }
  return sum_of_lanes<R>(sum);
}

// The first k with a weight above 0 at which the running sum of the weights exceeds `target`; the last
// k with such a weight where rounding lets none exceed it. The sums of a block and of its numbers may
// round differently, so a sum may exceed `target` only in the next block.
template <class R>
index find(const R* weights, index width, R target) {
  constexpr int L = lanes<R>, vectors = 4;
  R before = 0;
  index last = 0;
  for (index begin = 0; begin < width; begin += vectors * L) {
    const index end = begin + vectors * L < width ? begin + vectors * L : width;
    Vector<R> sums{};
    for (index k = begin; k < end; k += L) sums += load(weights + k);
    const R sum = sum_of_lanes<R>(sums);
    if (sum > 0) last = begin;
    if (before + sum > target) {
      R running = before;
      for (index k = begin; k < end; ++k)
        if ((running += weights[k]) > target && weights[k] > 0) return k;
    }
    before += sum;
  }
  index k = last + vectors * L < width ? last + vectors * L : width;
  while (k > last + 1 && !(weights[k - 1] > 0)) --k;
  return k - 1;
}

}  // namespace rnnfast::RNNFAST_TARGET
