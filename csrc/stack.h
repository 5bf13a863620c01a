// A whole module for inference in one call, so that a single small step is not spent in Python.
#pragma once

#include <pybind11/pybind11.h>

namespace rnnfast {

// Runs a stack of layers, x [T, B, I] ([B, T, I] with batch_first) or one step of one layer, x [B, I].
// `weights` is flat, in torch's order, with W_hr at the end of each direction's where h is `projected`;
// states are [layers * directions, B, H] (h: R, see layer.h), or [B, H] for a step. A state that is
// None means zeros (an input) or is not wanted (an output).
//
// Returns false, with nothing written, where x or a state is not what the kernels take: the caller's
// slower path then handles it or says what is wrong. Weights and outputs that do not fit raise
// ValueError or TypeError. Every tensor must be of one of the exact types in `types`.
bool infer(const pybind11::tuple& types, int cell, int layers, int directions, bool bias,
           bool projected, bool batch_first, int threads, pybind11::handle x, pybind11::handle h0,
           pybind11::handle c0, const pybind11::list& weights, pybind11::handle y, pybind11::handle h_n,
           pybind11::handle c_n);

}  // namespace rnnfast
