// The table of cells, and what a cell must provide.
//
// A step of a cell keeps `slots` numbers per hidden unit: first its `gates`, which hold pre-activations
// until the cell's formula replaces them by what backward needs, then any others (a cell state). Which
// products feed a gate is a Window, a range of slots: `input` gates receive W_ih x, and the gates of
// stage s receive W_hh times that stage's operand (stage 0: h; a later stage: what the stage before it
// returned). `weight_block[slot]` is the block of H rows in torch's weights that belongs to a gate.
// A gate outside the input window starts from its recurrent bias alone.
//
//   template <int stage, class V>
//   static V forward(V* s, V h, V c);
//     s: the slots, pre-activations in, values out; h, c: the states before the step.
//     Returns h after the step for the last stage, the next stage's operand for the others.
//
//   template <int stage, class V>
//   static void backward(const V* s, V h, V c, V grad, V* d, V& dh, V& dc);
//     s, h, c: as forward left and found them; grad: the gradient of what the stage returned.
//     d: out, the gradients of the stage's pre-activations (the last stage writes those of gates that
//     only the input feeds as well). dh: the gradient that reaches h other than through the products;
//     zero unless the last stage sets it, added to by the others. dc: in, of c after the step; out, of
//     c before it.
//
//   template <class V>
//   static V operand(const V* s, V h);
//     From the slots as forward left them, what one more product multiplies: that of stage 1, or where
//     the cell `projects` that of W_hr, which turns what the last stage returned into a narrower h. No
//     formula of such a cell reads h or sets dh.
//
// Stages run forward 0, 1, ... and backward in the opposite order.
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
                {Cell::input.begin, Cell::input.end},
                {},
                Cell::onnx};
  for (int gate = 0; gate < Cell::gates; ++gate) info.weight_block[gate] = Cell::weight_block[gate];
  for (int stage = 0; stage < Cell::stages; ++stage)
    info.recurrent[stage] = {Cell::recurrent[stage].begin, Cell::recurrent[stage].end};
  return info;
}

// One row per cell; the index of a row is the cell's number in the binding.
using Cells = CellList<RnnTanh, RnnRelu, Lstm, Gru, GruOriginal, LstmCoupled>;

}  // namespace rnnfast::RNNFAST_TARGET
