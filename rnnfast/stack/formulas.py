"""The formula of each cell in torch's operators. Each function has the name of its cell.

A function takes ``a = W_ih x + b_ih`` ``[B, G * H]``, the states ``h`` ``[B, R]`` and ``c`` ``[B, H]``
(None where the cell has none), ``w_hh`` ``[G * H, R]`` and ``b_hh`` ``[G * H]`` or None. It returns the
new ``h`` ``[B, H]``, before a projection, and the new ``c``. csrc/cells cites the papers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

__all__ = ["FORMULAS"]


def rnn_tanh(
    a: Tensor, h: Tensor, c: Tensor | None, w_hh: Tensor, b_hh: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    return torch.tanh(a + linear(h, w_hh, b_hh)), None


def rnn_relu(
    a: Tensor, h: Tensor, c: Tensor | None, w_hh: Tensor, b_hh: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    return torch.relu(a + linear(h, w_hh, b_hh)), None


def lstm(
    a: Tensor, h: Tensor, c: Tensor | None, w_hh: Tensor, b_hh: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    assert c is not None
    i, f, g, o = (a + linear(h, w_hh, b_hh)).chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def lstm_coupled(
    a: Tensor, h: Tensor, c: Tensor | None, w_hh: Tensor, b_hh: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    assert c is not None
    f, g, o = (a + linear(h, w_hh, b_hh)).chunk(3, 1)
    f, g = torch.sigmoid(f), torch.tanh(g)
    c = g + f * (c - g)
    return torch.sigmoid(o) * torch.tanh(c), c


def gru(
    a: Tensor, h: Tensor, c: Tensor | None, w_hh: Tensor, b_hh: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    (a_r, a_z, a_n), (u_r, u_z, u_n) = a.chunk(3, 1), linear(h, w_hh, b_hh).chunk(3, 1)
    r, z = torch.sigmoid(a_r + u_r), torch.sigmoid(a_z + u_z)
    n = torch.tanh(a_n + r * u_n)
    return n + z * (h - n), None


def gru_original(
    a: Tensor, h: Tensor, c: Tensor | None, w_hh: Tensor, b_hh: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    gates = 2 * h.size(-1)  # the rows of r and z
    b_gates, b_n = (None, None) if b_hh is None else (b_hh[:gates], b_hh[gates:])
    r, z = (a[:, :gates] + linear(h, w_hh[:gates], b_gates)).sigmoid().chunk(2, 1)
    n = torch.tanh(a[:, gates:] + linear(r * h, w_hh[gates:], b_n))
    return n + z * (h - n), None


_ALL = (rnn_tanh, rnn_relu, lstm, lstm_coupled, gru, gru_original)
FORMULAS = {formula.__name__: formula for formula in _ALL}
