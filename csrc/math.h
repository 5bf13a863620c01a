// exp, tanh and the logistic function, written once on a number type V: one or two SIMD
// vectors (cpu/vec.h, cpu/pack.h) or a float in a CUDA thread. The includer provides scalar_of,
// bits_of, splat, fma, clamp and bit_cast.
//
// exp(x) = 2^n * (1 + m), with n = round(x / ln 2), r = x - n ln 2 and m = expm1(r) = r + r^2 q(r).
// q is the Chebyshev interpolant of (expm1(r) - r) / r^2 on |r| <= ln(2)/2, of relative error below
// 8e-9 (float) and 2e-17 (double) in exp. Keeping m apart from 1 gives tanh its full precision near 0.
#pragma once

namespace rnnfast::RNNFAST_TARGET {

template <class T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr int mantissa_bits = 23;
  static constexpr float lowest = -87.0f, overflow = 89.0f;  // exp is normal; exp is infinite
  static constexpr float log2e = 1.4426950408889634f;
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.1219444005469058e-4f;
  static constexpr float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float q[] = {0.5f, 0.16666576305560638f, 0.04166655376256764f, 0.008363292753063031f,
                                0.00139263256181334621f};
};

template <>
struct ExpConstants<double> {
  static constexpr int mantissa_bits = 52;
  static constexpr double lowest = -708.0, overflow = 710.0;
  static constexpr double log2e = 1.4426950408889634;
  static constexpr double ln2_high = 0x1.62e42fee00000p-1, ln2_low = 0x1.a39ef35793c76p-33;
  static constexpr double round = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double q[] = {0x1.0000000000001p-1,  0x1.5555555555556p-3,  0x1.5555555553d05p-5,
                                 0x1.1111111110996p-7,  0x1.6c16c178b0646p-10, 0x1.a01a01a7da98dp-13,
                                 0x1.a019b87f7a6e9p-16, 0x1.71de0d573888bp-19, 0x1.28922d8c8d4fbp-22,
                                 0x1.af39789bfd689p-26};
};

// q(r) from its coefficient k on. No loop, since a CUDA thread has the coefficients as constants only.
template <int k, class V>
RNNFAST_INLINE V horner(V r) {
  using C = ExpConstants<scalar_of<V>>;
  constexpr scalar_of<V> coefficient = C::q[k];
  if constexpr (k + 1 == sizeof(C::q) / sizeof(C::q[0]))
    return splat<V>(coefficient);
  else
    return fma(horner<k + 1>(r), r, splat<V>(coefficient));
}

template <class V>
struct Exp {
  V scale, m;  // exp(x) = scale * (1 + m)
};

// For lowest <= x <= overflow; there the scale becomes infinite.
template <class V>
RNNFAST_INLINE Exp<V> exp_parts(V x) {
  using C = ExpConstants<scalar_of<V>>;
  const V shifted = fma(x, splat<V>(C::log2e), splat<V>(C::round));
  const V n = shifted - splat<V>(C::round);
  const V r = fma(n, splat<V>(-C::ln2_low), fma(n, splat<V>(-C::ln2_high), x));
  const V q = horner<0>(r);
  // The low bits of `shifted` hold n; moved into the exponent field they multiply 1.0 by 2^n.
  const auto bits = bit_cast<bits_of<V>>(shifted) << C::mantissa_bits;
  const V scale = bit_cast<V>(bits + bit_cast<bits_of<V>>(splat<V>(1)));
  return {scale, fma(q, r * r, r)};
}

// Exactly 0 and 1 where the true value rounds to them.
template <class V>
RNNFAST_INLINE V sigmoid(V x) {
  using C = ExpConstants<scalar_of<V>>;
  const V one = splat<V>(1);
  const Exp<V> e = exp_parts(clamp(-x, splat<V>(C::lowest), splat<V>(C::overflow)));
  return one / (one + e.scale * (one + e.m));
}

template <class V>
RNNFAST_INLINE V tanh(V x) {
  using C = ExpConstants<scalar_of<V>>;
  const Exp<V> e = exp_parts(clamp(x + x, splat<V>(C::lowest), splat<V>(-C::lowest)));
  const V expm1 = fma(e.scale, e.m, e.scale - splat<V>(1));
  return expm1 / (expm1 + splat<V>(2));
}

template <class V>
RNNFAST_INLINE V relu(V x) {
  return clamp(x, splat<V>(0), splat<V>(__builtin_inff()));
}

}  // namespace rnnfast::RNNFAST_TARGET
