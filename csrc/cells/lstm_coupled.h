// Long short-term memory with coupled gates: the input gate is 1 - f (Greff et al. 2017,
// arXiv 1503.04069, "CIFG"):
//   f = sigmoid(a_f)   g = tanh(a_g)   o = sigmoid(a_o)
//   c' = f c + (1 - f) g     h' = o tanh(c'),   where a = W_ih x + b_ih + W_hh h + b_hh
// With a projection (Sak et al. 2014, arXiv 1402.1128) h' = W_hr (o tanh(c')).
#pragma once

#include "cells/contract.h"

namespace rnnfast::RNNFAST_TARGET {

struct LstmCoupled {
  static constexpr const char* name = "lstm_coupled";
  enum Slot { f, g, o, c1, slots };
  static constexpr int gates = 3, stages = 1, weight_blocks = 3;
  static constexpr int weight_block[gates] = {0, 1, 2};
  static constexpr const char* block_names = "fgo";
  static constexpr Window input{f, o + 1}, recurrent[stages] = {{f, o + 1}};
  static constexpr int cell_state = c1;
  static constexpr bool projects = true;
  static constexpr Onnx onnx{"LSTM", 4, {~f, o, f, g}};  // 1 - sigmoid(a) = sigmoid(-a)

  template <int stage, class V>
  static RNNFAST_INLINE V forward(V* s, V, V c) {
    s[f] = sigmoid(s[f]);
    s[g] = tanh(s[g]);
    s[o] = sigmoid(s[o]);
    s[c1] = fma(s[f], c - s[g], s[g]);
    return operand(s, c);
  }

  template <class V>
  static RNNFAST_INLINE V operand(const V* s, V) {
    return s[o] * tanh(s[c1]);
  }

  template <class V>
  static RNNFAST_INLINE V cell_gradient(const V* s, V grad, V dc) {
    const V tc = tanh(s[c1]);
    return fma(grad * s[o], splat<V>(1) - tc * tc, dc);
  }

  template <int stage, class V>
  static RNNFAST_INLINE void backward(const V* s, V, V c, V grad, V* d, V&, V& dc) {
    const V one = splat<V>(1), tc = tanh(s[c1]);
    const V dc1 = cell_gradient(s, grad, dc);
    d[f] = dc1 * (c - s[g]) * s[f] * (one - s[f]);
    d[g] = dc1 * (one - s[f]) * (one - s[g] * s[g]);
    d[o] = grad * tc * s[o] * (one - s[o]);
    dc = dc1 * s[f];
  }
};

}  // namespace rnnfast::RNNFAST_TARGET
