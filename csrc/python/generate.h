// core/generate.h for Python. The GIL is released while the loops run.
#pragma once

#include <pybind11/pybind11.h>

namespace rnnfast {

// Adds `generate` and `beam_search`. Both take (stack, threads, model, state, ...): the model is
// (weights, embedding or None, head_w, head_b or None), the state (y, h, c or None).
void add_generate(pybind11::module_& m);

}  // namespace rnnfast
