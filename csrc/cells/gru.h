// The gated recurrent unit, in its two forms. a = W_ih x + b_ih, u = W_hh (.) + b_hh:
//   r = sigmoid(a_r + u_r)   z = sigmoid(a_z + u_z)   h' = (1 - z) n + z h
// Gru, as torch.nn.GRU and cuDNN compute it (the reset gate after the product):
//   n = tanh(a_n + r u_n),   every u from h
// GruOriginal (Cho et al. 2014, arXiv 1406.1078, eq. 5-8; the reset gate before the product):
//   n = tanh(a_n + u_n),     u_r, u_z from h, u_n from r h
#pragma once

#include "cells/contract.h"

namespace rnnfast::RNNFAST_TARGET {

struct Gru {
  static constexpr const char* name = "gru";
  enum Slot { n, r, z, un, slots };  // a_n first and u_n last: both windows are without gaps
  static constexpr int gates = 4, stages = 1, weight_blocks = 3;
  static constexpr int weight_block[gates] = {2, 0, 1, 2};
  static constexpr const char* block_names = "rzn";
  static constexpr Window input{n, z + 1}, recurrent[stages] = {{r, un + 1}};
  static constexpr int cell_state = -1;
  static constexpr bool projects = false;
  static constexpr Onnx onnx{"GRU", 3, {1, 0, 2}, nullptr, 1};

  template <int stage, class V>
  static RNNFAST_INLINE V forward(V* s, V h, V) {
    s[r] = sigmoid(s[r]);
    s[z] = sigmoid(s[z]);
    s[n] = tanh(fma(s[r], s[un], s[n]));
    return fma(s[z], h - s[n], s[n]);
  }

  template <int stage, class V>
  static RNNFAST_INLINE void backward(const V* s, V h, V, V grad, V* d, V& dh, V&) {
    const V one = splat<V>(1);
    d[n] = grad * (one - s[z]) * (one - s[n] * s[n]);
    d[un] = d[n] * s[r];
    d[r] = d[n] * s[un] * s[r] * (one - s[r]);
    d[z] = grad * (h - s[n]) * s[z] * (one - s[z]);
    dh = grad * s[z];
  }
};

struct GruOriginal {
  static constexpr const char* name = "gru_original";
  enum Slot { r, z, n, slots };
  static constexpr int gates = 3, stages = 2, weight_blocks = 3;
  static constexpr int weight_block[gates] = {0, 1, 2};
  static constexpr const char* block_names = "rzn";
  static constexpr Window input{r, n + 1}, recurrent[stages] = {{r, z + 1}, {n, n + 1}};
  static constexpr int cell_state = -1;
  static constexpr bool projects = false;
  static constexpr Onnx onnx{"GRU", 3, {z, r, n}, nullptr, 0};

  template <int stage, class V>
  static RNNFAST_INLINE V forward(V* s, V h, V) {
    if constexpr (stage == 0) {
      s[r] = sigmoid(s[r]);
      s[z] = sigmoid(s[z]);
      return operand(s, h);
    } else {
      s[n] = tanh(s[n]);
      return fma(s[z], h - s[n], s[n]);
    }
  }

  template <class V>
  static RNNFAST_INLINE V operand(const V* s, V h) {
    return s[r] * h;
  }

  template <int stage, class V>
  static RNNFAST_INLINE void backward(const V* s, V h, V, V grad, V* d, V& dh, V&) {
    const V one = splat<V>(1);
    if constexpr (stage == 1) {
      d[n] = grad * (one - s[z]) * (one - s[n] * s[n]);
      d[z] = grad * (h - s[n]) * s[z] * (one - s[z]);
      dh = grad * s[z];
    } else {
      d[r] = grad * h * s[r] * (one - s[r]);
      dh = fma(grad, s[r], dh);
    }
  }
};

}  // namespace rnnfast::RNNFAST_TARGET
