// exp, tanh and the logistic function, written once on a number type V: one or two SIMD
// vectors (cpu/kernels/vec.h, vector_pair.h) or a float in a CUDA thread. The includer provides
// scalar_of, bits_of, splat, fma, at_least, at_most, where_less and bit_cast.
//
// exp(x) = 2^n * (1 + m), with n = round(x / ln 2), r = x - n ln 2 and m = expm1(r) = r + r^2 q(r).
// q is the Chebyshev interpolant of (expm1(r) - r) / r^2 on |r| <= ln(2)/2, of relative error below
// 8e-9 (float) and 2e-17 (double) in exp.
#pragma once

namespace rnnfast::RNNFAST_TARGET {

template <class T>
struct Constants;

template <>
struct Constants<float> {
  static constexpr int mantissa_bits = 23;
  static constexpr float lowest = -87.0f,
                         overflow = 89.0f;  // exp(lowest) is normal; exp(overflow) is infinite
  static constexpr float log2e = 1.4426950408889634f;
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.1219444005469058e-4f;
  static constexpr float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float q[] = {0.5f, 0.16666576305560638f, 0.04166655376256764f, 0.008363292753063031f,
                                0.00139263256181334621f};
  static constexpr float tanh_near = 0.9140625f;
  static constexpr float d[] = {6.000000476837158f, 2.3999929428100586f, -0.011399731040000916f,
                                0.0004631546908058226f};
};

template <>
struct Constants<double> {
  static constexpr int mantissa_bits = 52;
  static constexpr double lowest = -708.0, overflow = 710.0;
  static constexpr double log2e = 1.4426950408889634;
  static constexpr double ln2_high = 0x1.62e42fee00000p-1, ln2_low = 0x1.a39ef35793c76p-33;
  static constexpr double round = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double q[] = {0x1.0000000000001p-1,  0x1.5555555555556p-3,  0x1.5555555553d05p-5,
                                 0x1.1111111110996p-7,  0x1.6c16c178b0646p-10, 0x1.a01a01a7da98dp-13,
                                 0x1.a019b87f7a6e9p-16, 0x1.71de0d573888bp-19, 0x1.28922d8c8d4fbp-22,
                                 0x1.af39789bfd689p-26};
  static constexpr double tanh_near = 0.9140625;
  static constexpr double d[] = {0x1.8p+2,
                                 0x1.3333333333331p+1,
                                 -0x1.767dce4345c07p-7,
                                 0x1.0a4e158138ff9p-11,
                                 -0x1.997cb56a71994p-16,
                                 0x1.41750b8a2ec3ap-20,
                                 -0x1.fbb61fd5b56ebp-25,
                                 0x1.8da87fd224563p-29,
                                 -0x1.0c3a980b791d4p-33};
};

// The polynomial in x that begins with coefficient k. There is no loop, since a CUDA thread has the
// coefficients only as constants at compile time.
template <const auto& coefficients, int k = 0, class V>
RNNFAST_INLINE V polynomial(V x) {
  constexpr scalar_of<V> coefficient = coefficients[k];
  if constexpr (k + 1 == sizeof(coefficients) / sizeof(coefficients[0]))
    return splat<V>(coefficient);
  else
    return fma(polynomial<coefficients, k + 1>(x), x, splat<V>(coefficient));
}

template <class V>
struct Exp {
  V scale, m;  // exp(x) = scale * (1 + m)
};

// For lowest <= x <= overflow; at overflow the scale becomes infinite.
//
// Tried: the range reduction of exp2 gains 0.3 percent of a training step, too little for a second set
// of coefficients.
template <class V>
RNNFAST_INLINE Exp<V> exp_parts(V x) {
  using C = Constants<scalar_of<V>>;
  const V shifted = fma(x, splat<V>(C::log2e), splat<V>(C::round));
  const V n = shifted - splat<V>(C::round);
  const V r = fma(n, splat<V>(-C::ln2_low), fma(n, splat<V>(-C::ln2_high), x));
  const V q = polynomial<C::q>(r);
  // The low bits of `shifted` hold n; moved into the exponent field they multiply 1.0 by 2^n.
  const auto bits = bit_cast<bits_of<V>>(shifted) << C::mantissa_bits;
  const V scale = bit_cast<V>(bits + bit_cast<bits_of<V>>(splat<V>(1)));
  return {scale, fma(q, r * r, r)};
}

// Returns exactly 0 or 1 where the true value rounds to it.
//
// Tried: a reciprocal estimate with a Newton step is 9 percent slower than the division (Zen 5).
template <class V>
RNNFAST_INLINE V sigmoid(V x) {
  using C = Constants<scalar_of<V>>;
  const V one = splat<V>(1);
  const Exp<V> e = exp_parts(at_most(at_least(-x, splat<V>(C::lowest)), splat<V>(C::overflow)));
  return one / (one + e.scale * (one + e.m));
}

// At most 1 unit in the last place off. With a = |x|, tanh(a) = b - b * 2 b^2 / c:
//   b = 1, c = exp(2 a) + 1 for large a: half a unit off where tanh saturates;
//   b = a, c = 2 a^3 / (a - tanh(a)) = d(a^2) for small a. d is almost linear, 6 + 12/5 a^2 - ..., and
//   its polynomial is of relative error below 2e-9 (float) and 2e-18 (double) in tanh.
// Below tanh_near the rounding of exp(2 a) + 1 costs too much. From tanh_near on d exceeds 8, where a
// float's last place is worth twice as much.
//
// Tried: b = min(a, 1) and c = max(d, exp(2 a) + 1), with the border at 1, need one operation less, but
// are 1.1 units off without fused multiply-adds.
template <class V>
RNNFAST_INLINE V tanh(V x) {
  using C = Constants<scalar_of<V>>;
  const V one = splat<V>(1), near = splat<V>(C::tanh_near);
  const auto sign = bit_cast<bits_of<V>>(x) & bit_cast<bits_of<V>>(splat<V>(-0.0f));
  const V a = bit_cast<V>(bit_cast<bits_of<V>>(x) ^ sign);
  const Exp<V> e = exp_parts(at_most(a + a, splat<V>(-C::lowest)));
  const V b = where_less(a, near, a, one), z = b * b;
  const V c = where_less(a, near, polynomial<C::d>(z), fma(e.scale, e.m, e.scale + one));
  const V y = fma(-b, (z + z) / c, b);
  return bit_cast<V>(bit_cast<bits_of<V>>(y) ^ sign);
}

template <class V>
RNNFAST_INLINE V relu(V x) {
  return at_least(x, splat<V>(0));
}

}  // namespace rnnfast::RNNFAST_TARGET
