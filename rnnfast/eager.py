"""Every cell as a loop of torch operators: slow, and differentiable in every way that torch knows.

The kernels give first derivatives; higher ones, forward mode and function transforms come from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


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
    if cell == "gru_original":
        hidden = h.size(-1)
        bias = (None, None) if b_hh is None else (b_hh[: 2 * hidden], b_hh[2 * hidden :])
        r, z = (a[:, : 2 * hidden] + F.linear(h, w_hh[: 2 * hidden], bias[0])).sigmoid().chunk(2, 1)
        n = torch.tanh(a[:, 2 * hidden :] + F.linear(r * h, w_hh[2 * hidden :], bias[1]))
        return n + z * (h - n), None
    u = F.linear(h, w_hh, b_hh)
    if cell == "gru":
        (a_r, a_z, a_n), (u_r, u_z, u_n) = a.chunk(3, 1), u.chunk(3, 1)
        r, z = torch.sigmoid(a_r + u_r), torch.sigmoid(a_z + u_z)
        n = torch.tanh(a_n + r * u_n)
        return n + z * (h - n), None
    if cell == "lstm":
        assert c is not None
        i, f, g, o = (a + u).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return h if w_hr is None else F.linear(h, w_hr), c
    return (torch.tanh(a + u) if cell == "rnn_tanh" else torch.relu(a + u)), None


def layer(
    cell: str,
    x: Tensor,
    h: Tensor,
    c: Tensor | None,
    weights: tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None],
    reverse: bool,
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    every_c: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Any]:
    """One direction of one layer: ``x [T, B, I]`` to ``y [T, B, R]``, ``h_n [B, R]``, ``c_n [B, H]``.

    With ``batch_sizes`` all sequences are packed: ``[sum of batch_sizes, features]``. ``reset [T, B]``
    says before which steps a row's states are zero. The last result is c after every step,
    ``[T, B, H]``, where ``every_c`` asks for it and there is a cell state.
    """

    def by_step(t: Tensor) -> Sequence[Tensor]:
        return t.unbind(0) if batch_sizes is None else torch.split(t, batch_sizes.tolist())

    def kept(state: Tensor, cut: Tensor | None) -> Tensor:
        return state if cut is None else state.masked_fill(cut[:, None], 0)

    steps = by_step(x)
    cuts: Sequence[Tensor | None] = [None] * len(steps) if reset is None else by_step(reset)
    pairs = list(zip(steps, cuts, strict=True))
    y: list[Tensor] = []
    cells: list[Tensor] = []
    for x_t, cut in reversed(pairs) if reverse else pairs:
        n = x_t.size(0)  # rows beyond have ended, or, in reverse, not begun
        h_0, c_0 = kept(h[:n], cut), None if c is None else kept(c[:n], cut)
        h_t, c_t = step(cell, x_t, h_0, c_0, *weights)
        h = torch.cat([h_t, h[n:]])
        c = None if c is None or c_t is None else torch.cat([c_t, c[n:]])
        y.append(h_t)
        cells += [c_t] if every_c and c_t is not None else []
    if reverse:
        y, cells = y[::-1], cells[::-1]
    join = torch.stack if batch_sizes is None else torch.cat
    return join(y), h, c, join(cells) if cells else None
