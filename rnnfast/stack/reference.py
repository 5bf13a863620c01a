"""Every cell as a loop of torch operators: slow, and differentiable in every way that torch knows.

The kernels give first derivatives; higher ones, forward mode and function transforms come from here.
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
    """One step: ``x [B, I]``, ``h [B, R]`` and ``c [B, H]`` to the new ``h`` and ``c``.

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

    ``inputs`` are time-major, with the states ``[B, R]`` and ``[B, H]`` and the weights of this
    direction. Where ``x`` is packed, so are all sequences. The last result is c after every step,
    ``[T, B, H]``, where ``config`` asks for it and there is a cell state.
    """
    x, h, c, weights, sizes, reset = inputs
    assert h is not None
    packed = sizes is not None and x.dim() == 2
    past: Tensor | None = None  # [T, B, 1]: which steps lie past a row's end
    if sizes is not None and not packed:
        past = (torch.arange(x.size(0), device=sizes.device)[:, None] >= sizes).to(x.device)[..., None]
        x = x.masked_fill(past, 0)  # what lies there may be NaN, whose gradient no mask stops later

    def by_step(t: Tensor | None) -> Sequence[Any]:
        if t is None:
            return [None] * len(steps)
        return torch.split(t, sizes.tolist()) if packed and sizes is not None else t.unbind(0)

    def before(state: Tensor, n: int, cut: Tensor | None) -> Tensor:
        return state[:n] if cut is None else state[:n].masked_fill(cut[:, None], 0)

    def after(new: Tensor, old: Tensor, ended: Tensor | None) -> Tensor:
        # Rows that a packed step lacks have ended, or, in reverse, not begun.
        return torch.cat([new, old[new.size(0) :]]) if ended is None else torch.where(ended, old, new)

    def output(new: Tensor, ended: Tensor | None) -> Tensor:
        return new if ended is None else new.masked_fill(ended, 0)

    steps = by_step(x)
    whole = list(zip(steps, by_step(reset), by_step(past), strict=True))
    y: list[Tensor] = []
    cells: list[Tensor] = []
    for x_t, cut, ended in reversed(whole) if reverse else whole:
        n = x_t.size(0)
        c_before = None if c is None else before(c, n, cut)
        h_t, c_t = step(config.cell, x_t, before(h, n, cut), c_before, (*weights,))
        h = after(h_t, h, ended)
        y.append(output(h_t, ended))
        if c is not None and c_t is not None:
            c = after(c_t, c, ended)
            cells += [output(c_t, ended)] if config.cell_states else []
    if reverse:
        y, cells = y[::-1], cells[::-1]
    join = torch.cat if packed else torch.stack
    return join(y), h, c, join(cells) if cells else None


def stack(config: StackConfig, inputs: Inputs) -> Outputs:
    """What :func:`ops.forward` computes, in torch operators."""
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

    def state(of: Tensor | None, number: int, width: int) -> Tensor:
        if of is None:
            return x.new_zeros(batch, width)
        return of if of.dim() == 2 else of[number]

    h_n: list[Tensor] = []
    c_n: list[Tensor] = []
    for k in range(config.layers):
        halves: list[Tensor] = []
        c_halves: list[Tensor] = []
        for d in range(config.directions):
            number = k * config.directions + d
            one = Inputs(
                y,
                state(h0, number, outputs),
                state(c0, number, hidden) if has_c else None,
                config.weights(weights, number),
                sizes,
                reset,
            )
            half, h, c, c_half = layer(config, one, d == 1)
            halves.append(half)
            h_n.append(h)
            if c is not None:
                c_n.append(c)
                c_halves.append(c_half)
        y = torch.cat(halves, -1)
    cell_states = torch.cat(c_halves, -1) if config.cell_states and has_c else None
    if is_step:
        cell_states = cell_states if cell_states is None else cell_states[0]
        return Outputs(y[0], None, c_n[0] if has_c else None, cell_states)
    if batch_first:
        y = y.transpose(0, 1).contiguous()
        if cell_states is not None:
            cell_states = cell_states.transpose(0, 1).contiguous()
    return Outputs(y, torch.stack(h_n), torch.stack(c_n) if has_c else None, cell_states)
