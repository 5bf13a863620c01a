"""The original GRU (Cho et al. 2014, arXiv 1406.1078, eq. 5-8) in eager torch; torch.nn has none.

The reset gate applies to h before the recurrent product:
n = tanh(W_in x + b_in + W_hn (r * h) + b_hn). Parameters and their names are torch.nn.GRU's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def original_gru_step(x: Tensor, h: Tensor, weights: list[Tensor]) -> Tensor:
    w_ih, w_hh, *biases = weights
    b_ih, b_hh = biases or (w_ih.new_zeros(len(w_ih)), w_hh.new_zeros(len(w_hh)))
    w_hr, w_hz, w_hn = w_hh.chunk(3)
    b_hr, b_hz, b_hn = b_hh.chunk(3)
    x_r, x_z, x_n = (x @ w_ih.T + b_ih).chunk(3, -1)
    r = torch.sigmoid(x_r + h @ w_hr.T + b_hr)
    z = torch.sigmoid(x_z + h @ w_hz.T + b_hz)
    n = torch.tanh(x_n + (r * h) @ w_hn.T + b_hn)
    return (1 - z) * n + z * h


class OriginalGRU(nn.GRU):
    def forward(self, input: Any, hx: Tensor | None = None) -> Any:
        x = input.transpose(0, 1) if self.batch_first else input
        directions = 2 if self.bidirectional else 1
        if hx is None:
            hx = x.new_zeros(self.num_layers * directions, x.shape[1], self.hidden_size)
        weights: list[list[Tensor]] = self.all_weights  # type: ignore[assignment]
        last = []
        for layer in range(self.num_layers):
            outputs = []
            for k in range(layer * directions, (layer + 1) * directions):
                steps = reversed(range(len(x))) if k % directions else range(len(x))
                h, states = hx[k], {}
                for t in steps:
                    states[t] = h = original_gru_step(x[t], h, weights[k])
                outputs.append(torch.stack([states[t] for t in range(len(x))]))
                last.append(h)
            x = torch.cat(outputs, -1)
        return x.transpose(0, 1) if self.batch_first else x, torch.stack(last)


class OriginalGRUCell(nn.GRUCell):
    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        if hx is None:
            hx = input.new_zeros(len(input), self.hidden_size)
        return original_gru_step(input, hx, list(self.parameters()))
