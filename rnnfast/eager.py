"""Every cell as a loop of torch operators: slow, and differentiable in every way that torch knows.

The kernels give first derivatives; higher ones, forward mode and function transforms come from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .formulas import FORMULAS


def step(
    cell: str,
    x: Tensor,
    h: Tensor,
    c: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """One step: ``x [B, I]``, ``h [B, R]`` and ``c [B, H]`` to the new ``h`` and ``c``."""
    a = F.linear(x, w_ih, b_ih)
    h, c = FORMULAS[cell](a, h, c, w_hh, b_hh)
    return h if w_hr is None else F.linear(h, w_hr), c


def layer(
    cell: str,
    x: Tensor,
    h: Tensor,
    c: Tensor | None,
    weights: tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None],
    reverse: bool,
    sizes: Tensor | None,
    reset: Tensor | None,
    every_c: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Any]:
    """One direction of one layer: ``x [T, B, I]`` to ``y [T, B, R]``, ``h_n [B, R]``, ``c_n [B, H]``.

    ``sizes`` are those of :func:`ops.forward`: where ``x`` is packed, so are all sequences.
    ``reset [T, B]`` says before which steps a row's states are zero. The last result is c after every
    step, ``[T, B, H]``, where ``every_c`` asks for it and there is a cell state.
    """
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
        h_t, c_t = step(
            cell, x_t, before(h, n, cut), None if c is None else before(c, n, cut), *weights
        )
        h = after(h_t, h, ended)
        y.append(output(h_t, ended))
        if c is not None and c_t is not None:
            c = after(c_t, c, ended)
            cells += [output(c_t, ended)] if every_c else []
    if reverse:
        y, cells = y[::-1], cells[::-1]
    join = torch.cat if packed else torch.stack
    return join(y), h, c, join(cells) if cells else None
