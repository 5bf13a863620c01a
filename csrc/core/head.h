// The end of a model that chooses among classes: the struct that crosses to a kernel.
#pragma once

#include "core/layer.h"

namespace rnnfast {

// scores[r][v] = bias[v] + sum over k of x[r][k] w[v][k], the logits of V classes. Rows of scores are
// padded with -infinity to `width` numbers, whole vectors.
template <class T>
struct Head {
  index rows, depth, classes;  // those of `chosen`, R, V
  Matrix<const T> x;           // [B, R]
  Matrix<const T> w;           // [V, R]
  const T* bias;               // [V]; null means zeros
  T* packed;                   // w and bias in the kernel's order
  Real<T>* scores;             // [B][width]
  const index* chosen;         // the rows of x whose scores are wanted
};

}  // namespace rnnfast
