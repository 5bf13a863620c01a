// The table of cells, and what a cell must provide.
//
// A step of a cell keeps `slots` numbers per hidden unit: first its `gates`, then any others (a cell
// state). A gate holds its pre-activation until the cell's formula replaces it by the value that
// backward needs. A Window is a range of gates. The gates of the window `input` receive W_ih x. The
// gates of the window `recurrent[s]` receive W_hh times the operand of stage s: h in stage 0, what
// stage s - 1 returned in a later stage. `weight_block[gate]` is the block of H rows in torch's weights
// that belongs to a gate, and `block_names` has a letter for each block. A gate outside `input` starts
// from its recurrent bias alone.
//
//   template <int stage, class V>
//   static V forward(V* s, V h, V c);
//     s: the slots; pre-activations before the call, values after it. h, c: the states before the step.
//     The last stage returns h after the step, any other stage returns the next stage's operand.
//
//   template <int stage, class V>
//   static void backward(const V* s, V h, V c, V grad, V* d, V& dh, V& dc);
//     s: the slots after forward. h, c: the states before the step. grad: the gradient of what the
//     stage returned. d: output, the gradients of the stage's pre-activations; the last stage also
//     writes those of the gates that only the input feeds. dh: the part of the gradient of h that does
//     not come through the products; the last stage sets it or leaves it zero, the other stages add to
//     it. dc: before the call, the gradient of c after the step; after the call, that of c before the
//     step.
//
//   template <class V>
//   static V cell_gradient(const V* s, V grad, V dc);
//     Only cells with a cell state: the whole gradient of c after the step, from the arguments of
//     backward. `dc` is the part that does not come through the step's output.
//
//   template <class V>
//   static V operand(const V* s, V h);
//     Computes the operand of one more product from the slots after forward: the product of stage 1,
//     or, where the cell `projects`, the product with W_hr, which turns what the last stage returned
//     into a narrower h. The formulas of a cell that `projects` do not read h and do not set dh.
//
// Forward runs the stages 0, 1, ...; backward runs them in the opposite order.
//
// `name` is what Python calls the cell; its formula in torch's operators has the same name
// (rnnfast/stack/formulas.py). `onnx` is the operator of ONNX that computes the cell (info.h).
#pragma once

#include "cells/gru.h"
#include "cells/lstm.h"
#include "cells/lstm_coupled.h"
#include "cells/rnn.h"

namespace rnnfast::RNNFAST_TARGET {

template <class... Cell>
struct CellList {
  static constexpr int size = sizeof...(Cell);
};

// Evaluated by the compiler, so that a CUDA kernel needs no array of the cell at run time.
template <class Cell>
consteval CellInfo info_of() {
  CellInfo info{Cell::name,
                Cell::slots,
                Cell::gates,
                Cell::weight_blocks,
                Cell::stages,
                Cell::cell_state >= 0,
                Cell::projects,
                {},
                Cell::block_names,
                {Cell::input.begin, Cell::input.end},
                {},
                0,
                Cell::onnx};
  for (int gate = 0; gate < Cell::gates; ++gate) info.weight_block[gate] = Cell::weight_block[gate];
  for (int stage = 0; stage < Cell::stages; ++stage) {
    const auto window = Cell::recurrent[stage];
    info.recurrent[stage] = {window.begin, window.end};
    if (window.width() > info.widest) info.widest = window.width();
  }
  return info;
}

// One row per cell; the index of a row is the cell's number in the binding.
using Cells = CellList<RnnTanh, RnnRelu, Lstm, Gru, GruOriginal, LstmCoupled>;

}  // namespace rnnfast::RNNFAST_TARGET
