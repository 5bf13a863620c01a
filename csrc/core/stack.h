// A stack of recurrent layers on tensors in memory: without Python, and without torch.
//
// A caller makes a Call, checks it and what it writes, and only then runs it: every size is checked
// before any address is used, and nothing is written when a check fails. All that throws is
// std::invalid_argument for sizes, WrongType for dtypes, and std::bad_alloc before anything is written.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "core/call.h"
#include "cpu/memory.h"

namespace rnnfast {

// What a call writes; absent: not wanted. `saved` keeps what backward needs.
struct Outputs {
  View y, h_n, c_n, cell_states, saved;

  void check(const Call& call) const;
};

// Gradients: of the outputs, absent means zeros; of the inputs, absent means not wanted.
struct GradientViews {
  View dy, dh_n, dc_n, dcell_states;
  View dx, dh0, dc0;
  AllWeights weights;

  void check(const Call& call) const;
};

// The packed weights of every direction of every layer.
using Panels = std::vector<void*>;

// `panels` are null or from pack, of the same weights.
void forward(const Call& call, const Outputs& out, const Panels* panels, int threads);

// Reads what forward read and left.
void backward(const Call& call, const View& y, const View& saved, const GradientViews& grads,
              int threads);

// Of the call only its weights, dtype and inputs matter.
std::vector<std::unique_ptr<Memory>> pack(const Call& call);

// The size of `saved` for so many rows of x; none where it is out of range.
std::optional<std::size_t> saved_bytes(const Description& stack, Dtype dtype, index rows, index hidden,
                                       index outputs);

}  // namespace rnnfast
