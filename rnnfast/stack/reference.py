"""A stack of layers as a loop of torch operators: slow, but torch can differentiate it in every way.

The kernels compute first derivatives. This module serves higher derivatives, forward-mode
differentiation and function transforms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .config import Inputs, Outputs, StackConfig
from .formulas import FORMULAS

Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


def step(
    cell: str, x: Tensor, h: Tensor, c: Tensor | None, weights: Weights
) -> tuple[Tensor, Tensor | None]:
    """One step: from ``x [B, I]``, ``h [B, R]`` and ``c [B, H]`` to the new ``h`` and ``c``.

    ``weights`` are w_ih, w_hh, b_ih, b_hh and w_hr.
    """
    w_ih, w_hh, b_ih, b_hh, w_hr = weights
    a = F.linear(x, w_ih, b_ih)
    h, c = FORMULAS[cell](a, h, c, w_hh, b_hh)
    return h if w_hr is None else F.linear(h, w_hr), c


def layer(
    config: StackConfig, inputs: Inputs, reverse: bool
) -> tuple[Tensor, Tensor, Tensor | None, Any]:
    """One direction of one layer: ``x [T, B, I]`` to ``y [T, B, R]``, ``h_n [B, R]``, ``c_n [B, H]``.

    ``inputs`` are time-major, with states ``[B, R]`` and ``[B, H]`` and the weights of this direction.
    If ``x`` is packed, all sequences are packed. The fourth result is c after every step,
    ``[T, B, H]``, or None without ``config.cell_states`` or without a cell state.
    """
    x, h, c, weights, sizes, reset = inputs
    assert h is not None
    is_packed = sizes is not None and x.dim() == 2
    padding: Tensor | None = None  # [T, B, 1]: whether a step is past its row's end
    if sizes is not None and not is_packed:
        padding = (torch.arange(x.size(0), device=sizes.device)[:, None] >= sizes).to(x.device)[
            ..., None
        ]
        x = x.masked_fill(padding, 0)  # padding may be NaN, and no later mask would stop its gradient

    def by_step(t: Tensor | None) -> Sequence[Any]:
        if t is None:
            return [None] * len(x_steps)
        return torch.split(t, sizes.tolist()) if is_packed and sizes is not None else t.unbind(0)

    def before(state: Tensor, n: int, reset_t: Tensor | None) -> Tensor:
        return state[:n] if reset_t is None else state[:n].masked_fill(reset_t[:, None], 0)

    def after(new: Tensor, old: Tensor, padding_t: Tensor | None) -> Tensor:
        if padding_t is not None:
            return torch.where(padding_t, old, new)
        # The missing rows of a packed step have ended or, in reverse, not begun.
        return torch.cat([new, old[new.size(0) :]])

    def output(new: Tensor, padding_t: Tensor | None) -> Tensor:
        return new if padding_t is None else new.masked_fill(padding_t, 0)

    x_steps = by_step(x)
    steps = list(zip(x_steps, by_step(reset), by_step(padding), strict=True))
    y: list[Tensor] = []
    cells: list[Tensor] = []
    for x_t, reset_t, padding_t in reversed(steps) if reverse else steps:
        n = x_t.size(0)
        c_before = None if c is None else before(c, n, reset_t)
        h_t, c_t = step(config.cell, x_t, before(h, n, reset_t), c_before, (*weights,))
        h = after(h_t, h, padding_t)
        y.append(output(h_t, padding_t))
        if c is not None and c_t is not None:
            c = after(c_t, c, padding_t)
            cells += [output(c_t, padding_t)] if config.cell_states else []
    if reverse:
        y, cells = y[::-1], cells[::-1]
    join = torch.cat if is_packed else torch.stack
    return join(y), h, c, join(cells) if cells else None


def stack(config: StackConfig, inputs: Inputs) -> Outputs:
    """As :func:`ops.forward`, in torch operators; differentiable, and without ``saved``."""
    x, h0, c0, weights, sizes, reset = inputs
    is_step = inputs.is_step
    if is_step and reset is not None:
        reset = reset[None]
    outputs, hidden = config.widths(weights)
    batch_first = config.batch_first and x.dim() == 3
    y = x[None] if is_step else x.transpose(0, 1) if batch_first else x
    if reset is not None and x.dim() == 3:
        reset = reset.transpose(0, 1) if batch_first else reset
    batch = y.size(1) if y.dim() == 3 else int(sizes[0])  # type: ignore[index]
    has_c = config.has_c

    def state(states: Tensor | None, number: int, width: int) -> Tensor:
        if states is None:
            return x.new_zeros(batch, width)
        return states if states.dim() == 2 else states[number]

    h_n: list[Tensor] = []
    c_n: list[Tensor] = []
    for k in range(config.layers):
        y_parts: list[Tensor] = []
        c_parts: list[Tensor] = []
        for d in range(config.directions):
            number = k * config.directions + d
            layer_inputs = Inputs(
                y,
                state(h0, number, outputs),
                state(c0, number, hidden) if has_c else None,
                config.weights(weights, number),
                sizes,
                reset,
            )
            y_part, h, c, c_part = layer(config, layer_inputs, d == 1)
            y_parts.append(y_part)
            h_n.append(h)
            if c is not None:
                c_n.append(c)
                c_parts.append(c_part)
        y = torch.cat(y_parts, -1)
    cell_states = torch.cat(c_parts, -1) if config.cell_states and has_c else None
    if is_step:
        cell_states = cell_states if cell_states is None else cell_states[0]
        return Outputs(y[0], None, c_n[0] if has_c else None, cell_states)
    if batch_first:
        y = y.transpose(0, 1).contiguous()
        if cell_states is not None:
            cell_states = cell_states.transpose(0, 1).contiguous()
    return Outputs(y, torch.stack(h_n), torch.stack(c_n) if has_c else None, cell_states)
