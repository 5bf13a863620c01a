"""Every cell as its formula, one step at a time: the truth that the tests compare with.

Run it in float64 for the truth; in float32 it is a fair peer where torch.nn has no such cell.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def rnn_tanh(x, h, c, w_ih, w_hh, b_ih, b_hh):
    return (x @ w_ih.T + b_ih + h @ w_hh.T + b_hh).tanh(), c


def rnn_relu(x, h, c, w_ih, w_hh, b_ih, b_hh):
    return (x @ w_ih.T + b_ih + h @ w_hh.T + b_hh).relu(), c


def lstm(x, h, c, w_ih, w_hh, b_ih, b_hh):
    i, f, g, o = (x @ w_ih.T + b_ih + h @ w_hh.T + b_hh).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def lstm_coupled(x, h, c, w_ih, w_hh, b_ih, b_hh):
    f, g, o = (x @ w_ih.T + b_ih + h @ w_hh.T + b_hh).chunk(3, -1)
    c = f.sigmoid() * c + (1 - f.sigmoid()) * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru(x, h, c, w_ih, w_hh, b_ih, b_hh):
    xr, xz, xn = (x @ w_ih.T + b_ih).chunk(3, -1)
    hr, hz, hn = (h @ w_hh.T + b_hh).chunk(3, -1)
    r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
    n = (xn + r * hn).tanh()
    return (1 - z) * n + z * h, c


def gru_original(x, h, c, w_ih, w_hh, b_ih, b_hh):
    xr, xz, xn = (x @ w_ih.T + b_ih).chunk(3, -1)
    (w_r, w_z, w_n), (b_r, b_z, b_n) = w_hh.chunk(3), b_hh.chunk(3)
    r = (xr + h @ w_r.T + b_r).sigmoid()
    z = (xz + h @ w_z.T + b_z).sigmoid()
    n = (xn + (r * h) @ w_n.T + b_n).tanh()
    return (1 - z) * n + z * h, c


@dataclass(frozen=True)
class Cell:
    step: Callable[..., tuple[Tensor, Tensor]]
    gates: int
    layer: str  # the class of torch.nn and of rnnfast
    options: tuple[tuple[str, object], ...] = ()  # what its constructor needs
    in_torch: bool = True

    @property
    def has_c(self) -> bool:
        return self.layer == "LSTM"


CELLS = {
    "rnn_tanh": Cell(rnn_tanh, 1, "RNN"),
    "rnn_relu": Cell(rnn_relu, 1, "RNN", (("nonlinearity", "relu"),)),
    "lstm": Cell(lstm, 4, "LSTM"),
    "lstm_coupled": Cell(lstm_coupled, 3, "LSTM", (("coupled_gates", True),), in_torch=False),
    "gru": Cell(gru, 3, "GRU"),
    "gru_original": Cell(gru_original, 3, "GRU", (("reset_after", False),), in_torch=False),
}


def layer(cell, x, h, c, weights, *, w_hr=None, reverse=False):
    """One direction of one layer: x [T, B, I] to y [T, B, H], h_n and c_n [B, H].

    `weights`: w_ih, w_hh, b_ih, b_hh. With w_hr [R, H] the cell's output is projected, and h is R wide.
    """
    step = CELLS[cell].step
    y: list[Tensor] = [h] * len(x)
    for t in reversed(range(len(x))) if reverse else range(len(x)):
        h, c = step(x[t], h, c, *weights)
        h = h if w_hr is None else h @ w_hr.T
        y[t] = h
    return torch.stack(y), h, c


def stack(cell, module, x, h0, c0):
    """All layers and directions of a module without dropout, x [T, B, I] time-major."""
    directions = 2 if module.bidirectional else 1
    h_n, c_n = [], []
    for number in range(module.num_layers):
        halves = []
        for direction in range(directions):
            suffix = f"l{number}" + ("_reverse" if direction else "")
            names = [f"{kind}_{suffix}" for kind in ("weight_ih", "weight_hh")]
            w_ih, w_hh = (getattr(module, name) for name in names)
            zero = w_ih.new_zeros(len(w_ih))
            b_ih = getattr(module, f"bias_ih_{suffix}", zero)
            b_hh = getattr(module, f"bias_hh_{suffix}", zero)
            k = number * directions + direction
            w_hr = getattr(module, f"weight_hr_{suffix}", None)
            weights = (w_ih, w_hh, b_ih, b_hh)
            y, h, c = layer(cell, x, h0[k], c0[k], weights, w_hr=w_hr, reverse=direction == 1)
            halves.append(y)
            h_n.append(h)
            c_n.append(c)
        x = torch.cat(halves, -1)
    return x, torch.stack(h_n), torch.stack(c_n)
