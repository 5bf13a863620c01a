// Two vectors that a cell's formula treats as one number, so that the operations on both interleave. A
// single chain of dependent operations, as exp is, fills the processor's schedulers and leaves its
// execution units idle.
#pragma once

#include "cpu/kernels/vec.h"

namespace rnnfast::RNNFAST_TARGET {

template <class V>
struct VectorPair {
  V a, b;
};

template <class V>
struct Traits<VectorPair<V>> {
  using scalar = scalar_of<V>;
  using bits = VectorPair<bits_of<V>>;
  static constexpr int vectors = 2;
};

template <class V>
RNNFAST_INLINE VectorPair<V> operator+(VectorPair<V> x, VectorPair<V> y) {
  return {x.a + y.a, x.b + y.b};
}
template <class V>
RNNFAST_INLINE VectorPair<V> operator-(VectorPair<V> x, VectorPair<V> y) {
  return {x.a - y.a, x.b - y.b};
}
template <class V>
RNNFAST_INLINE VectorPair<V> operator-(VectorPair<V> x) {
  return {-x.a, -x.b};
}
template <class V>
RNNFAST_INLINE VectorPair<V> operator*(VectorPair<V> x, VectorPair<V> y) {
  return {x.a * y.a, x.b * y.b};
}
template <class V>
RNNFAST_INLINE VectorPair<V> operator/(VectorPair<V> x, VectorPair<V> y) {
  return {x.a / y.a, x.b / y.b};
}
template <class V>
RNNFAST_INLINE VectorPair<V> operator<<(VectorPair<V> x, int n) {
  return {x.a << n, x.b << n};
}
template <class V>
RNNFAST_INLINE VectorPair<V> operator&(VectorPair<V> x, VectorPair<V> y) {
  return {x.a & y.a, x.b & y.b};
}
template <class V>
RNNFAST_INLINE VectorPair<V> operator^(VectorPair<V> x, VectorPair<V> y) {
  return {x.a ^ y.a, x.b ^ y.b};
}
template <class V>
RNNFAST_INLINE VectorPair<V> fma(VectorPair<V> x, VectorPair<V> y, VectorPair<V> z) {
  return {fma(x.a, y.a, z.a), fma(x.b, y.b, z.b)};
}
template <class V>
RNNFAST_INLINE VectorPair<V> at_least(VectorPair<V> x, VectorPair<V> low) {
  return {at_least(x.a, low.a), at_least(x.b, low.b)};
}
template <class V>
RNNFAST_INLINE VectorPair<V> at_most(VectorPair<V> x, VectorPair<V> high) {
  return {at_most(x.a, high.a), at_most(x.b, high.b)};
}
template <class V>
RNNFAST_INLINE VectorPair<V> where_less(VectorPair<V> a, VectorPair<V> b, VectorPair<V> x,
                                        VectorPair<V> y) {
  return {where_less(a.a, b.a, x.a, y.a), where_less(a.b, b.b, x.b, y.b)};
}

// gather makes a V of the vectors f(0) and f(1), or of f(0) alone. scatter calls f(k, vector k of v).
template <class V, class F>
RNNFAST_INLINE V gather(F f) {
  if constexpr (Traits<V>::vectors == 2)
    return {f(0), f(1)};
  else
    return f(0);
}
template <class V, class F>
RNNFAST_INLINE void scatter(V v, F f) {
  if constexpr (Traits<V>::vectors == 2) {
    f(0, v.a);
    f(1, v.b);
  } else {
    f(0, v);
  }
}

}  // namespace rnnfast::RNNFAST_TARGET
