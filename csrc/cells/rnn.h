// The Elman network (Elman 1990, Finding structure in time), as torch.nn.RNN:
//   h' = f(W_ih x + b_ih + W_hh h + b_hh),   f = tanh or ReLU
#pragma once

#include <limits>

#include "cells/contract.h"

namespace rnnfast::RNNFAST_TARGET {

template <class Activation>
struct Rnn {
  enum Slot { h1, slots };
  static constexpr int gates = 1, stages = 1, weight_blocks = 1;
  static constexpr int weight_block[gates] = {0};
  static constexpr const char* block_names = "h";
  static constexpr Window input{h1, h1 + 1}, recurrent[stages] = {{h1, h1 + 1}};
  static constexpr int cell_state = -1;
  static constexpr bool projects = false;

  template <int stage, class V>
  static RNNFAST_INLINE V forward(V* s, V, V) {
    return s[h1] = Activation::value(s[h1]);
  }

  template <int stage, class V>
  static RNNFAST_INLINE void backward(const V* s, V, V, V grad, V* d, V&, V&) {
    d[h1] = Activation::derivative(s[h1], grad);
  }
};

// derivative(y, grad) needs only the value y of the activation, so that nothing else must be kept.
struct Tanh {
  template <class V>
  static RNNFAST_INLINE V value(V a) {
    return tanh(a);
  }
  template <class V>
  static RNNFAST_INLINE V derivative(V y, V grad) {
    return grad * (splat<V>(1) - y * y);
  }
};

struct Relu {
  template <class V>
  static RNNFAST_INLINE V value(V a) {
    return relu(a);
  }
  template <class V>
  static RNNFAST_INLINE V derivative(V y, V grad) {
    // As in torch, the gradient also passes where y is NaN. The CPU's kernels flush denormals, so there
    // no positive y is below the smallest normal number.
    return where_less(y, splat<V>(std::numeric_limits<scalar_of<V>>::min()), splat<V>(0), grad);
  }
};

struct RnnTanh : Rnn<Tanh> {
  static constexpr const char* name = "rnn_tanh";
  static constexpr Onnx onnx{"RNN", 1, {0}, "Tanh"};
};

struct RnnRelu : Rnn<Relu> {
  static constexpr const char* name = "rnn_relu";
  static constexpr Onnx onnx{"RNN", 1, {0}, "Relu"};
};

}  // namespace rnnfast::RNNFAST_TARGET
