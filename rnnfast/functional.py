"""Layers, directions, dropout: what lies between a module and one layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import autograd, ops
from .autograd import Outputs, Spec


def recurrent(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    *,
    bias: bool,
    num_layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
    projected: bool = False,
    batch_sizes: Tensor | None = None,
    fused: bool = True,
) -> Outputs:
    """A stack of layers, as torch's ``_VF.lstm`` and its kin compute it.

    ``x [T, B, I]`` (``[B, T, I]`` with ``batch_first``), ``h0`` and ``c0 [layers * D, B, H]`` or None
    for zeros, ``weights`` flat in torch's order. Returns ``y [T, B, D * H]`` (likewise), ``h_n`` and
    ``c_n [layers * D, B, H]``; ``c_n`` is None for cells without a cell state. Where h is projected to
    a width R, that stands in the place of H for ``y``, ``h0`` and ``h_n``. With ``batch_sizes``
    ``x`` and ``y`` are packed, ``[sum of batch_sizes, features]``. With ``fused=False`` torch's
    operators compute it, differentiable in every way.
    """
    directions = 2 if bidirectional else 1
    layer = autograd.layer if fused else autograd.eager_layer
    per_layer = len(weights) // num_layers
    batch_first = batch_first and batch_sizes is None
    y = x.transpose(0, 1) if batch_first else x
    h_n: list[Tensor] = []
    c_n: list[Tensor] = []
    for k in range(num_layers):
        if k > 0 and dropout > 0 and training:
            y = F.dropout(y, dropout)  # time-major, as torch's is: the same mask from the same seed
        y, h, c = layer(
            Spec(cell, bias, directions, batch_first and k == num_layers - 1, batch_sizes, projected),
            y,
            _layer_state(h0, k, num_layers, directions),
            _layer_state(c0, k, num_layers, directions),
            weights[k * per_layer : (k + 1) * per_layer],
        )
        h_n.append(h)
        if c is not None:
            c_n.append(c)
    return y, _joined(h_n), _joined(c_n) if c_n else None


def infer(
    cell: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Any],
    *,
    bias: bool,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    projected: bool = False,
) -> Outputs | None:
    """What :func:`recurrent` returns, without gradients or dropout, at the least cost of a call.

    None where an argument is not what the kernels take: then :func:`recurrent` or torch must decide.
    ``x [B, I]`` is one step of one layer, with states ``[B, H]``.
    """
    directions = 2 if bidirectional else 1
    number = ops.CELLS[cell]
    return ops.infer(number, num_layers, directions, bias, projected, batch_first, x, h0, c0, weights)


def _layer_state(state: Tensor | None, k: int, layers: int, directions: int) -> Tensor | None:
    if state is None or layers == 1:
        return state
    return state[k * directions : (k + 1) * directions]


def _joined(states: list[Tensor]) -> Tensor:
    return states[0] if len(states) == 1 else torch.cat(states)
