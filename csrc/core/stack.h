// A stack of recurrent layers on tensors in memory: without Python, and without torch.
//
// A caller makes a Call, checks the Call and its outputs, and only then runs it: every size is checked
// before any address is used, and nothing is written when a check fails. The functions throw only
// std::invalid_argument for sizes, WrongType for dtypes, and OutOfMemory or std::bad_alloc. After the
// last two some outputs may be written: a later layer takes its memory when the layers before it have
// run.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "core/call.h"
#include "cpu/memory.h"

namespace rnnfast {

// What a call writes; an absent view is not wanted. `saved` keeps what backward needs.
struct Outputs {
  View y, h_n, c_n, cell_states, saved;

  void check(const Call& call) const;
};

// An absent gradient of an output means zeros. An absent gradient of an input is not wanted.
struct GradientViews {
  View dy, dh_n, dc_n, dcell_states;
  View dx, dh0, dc0;
  AllWeights weights;
  // The norms of dL/dh_t and dL/dc_t over the rows and units of each step: float64
  // [layers, directions, T]. Absent: not wanted.
  View dh_norms{"dh_norms"}, dc_norms{"dc_norms"};

  void check(const Call& call) const;
};

// The packed weights of every direction of every layer.
using Panels = std::vector<void*>;

// `panels` is null, or has the memory that pack made of the same weights.
void forward(const Call& call, const Outputs& out, const Panels* panels, int threads);

// Reads the inputs of the forward call, and its outputs y and saved.
void backward(const Call& call, const View& y, const View& saved, const GradientViews& grads,
              int threads);

// Reads only the weights, the dtype and the input size of the call.
std::vector<std::unique_ptr<Memory>> pack(const Call& call);

// The size of `saved` for `rows` rows of x; nullopt where an argument or the size is out of range.
std::optional<std::size_t> saved_bytes(const Description& stack, Dtype dtype, index rows, index hidden,
                                       index outputs);

}  // namespace rnnfast
