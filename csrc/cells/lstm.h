// Long short-term memory (Hochreiter & Schmidhuber 1997; forget gate: Gers et al. 2000), as
// torch.nn.LSTM:
//   i = sigmoid(a_i)   f = sigmoid(a_f)   g = tanh(a_g)   o = sigmoid(a_o)
//   c' = f c + i g     h' = o tanh(c'),   where a = W_ih x + b_ih + W_hh h + b_hh
// With a projection (Sak et al. 2014, arXiv 1402.1128) h' = W_hr (o tanh(c')).
#pragma once

#include "cells/contract.h"

namespace rnnfast::RNNFAST_TARGET {

struct Lstm {
  static constexpr const char* name = "lstm";
  enum Slot { i, f, g, o, c1, slots };
  static constexpr int gates = 4, stages = 1, weight_blocks = 4;
  static constexpr int weight_block[gates] = {0, 1, 2, 3};
  static constexpr const char* block_names = "ifgo";
  static constexpr Window input{i, o + 1}, recurrent[stages] = {{i, o + 1}};
  static constexpr int cell_state = c1;
  static constexpr bool projects = true;
  static constexpr Onnx onnx{"LSTM", 4, {i, o, f, g}};

  template <int stage, class V>
  static RNNFAST_INLINE V forward(V* s, V, V c) {
    s[i] = sigmoid(s[i]);
    s[f] = sigmoid(s[f]);
    s[g] = tanh(s[g]);
    s[o] = sigmoid(s[o]);
    s[c1] = fma(s[f], c, s[i] * s[g]);
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
    d[i] = dc1 * s[g] * s[i] * (one - s[i]);
    d[f] = dc1 * c * s[f] * (one - s[f]);
    d[g] = dc1 * s[i] * (one - s[g] * s[g]);
    d[o] = grad * tc * s[o] * (one - s[o]);
    dc = dc1 * s[f];
  }
};

}  // namespace rnnfast::RNNFAST_TARGET
