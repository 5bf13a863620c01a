"""Cells that torch.nn does not have, in eager torch: the peers of rnnfast's own in ``rnnfast check``.

The original GRU (Cho et al. 2014, arXiv 1406.1078, eq. 5-8) applies the reset gate to h before the
recurrent product: n = tanh(W_in x + b_in + W_hn (r * h) + b_hn). Parameters and their names are
torch.nn.GRU's.

The LSTM with coupled gates (Greff et al. 2017, arXiv 1503.04069, "CIFG") has the input gate i = 1 - f.
Parameters and their names are those of ``rnnfast.LSTM(coupled_gates=True)``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import rnnfast

States = tuple[Tensor, ...]


def _products(x: Tensor, h: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    """W_ih x + b_ih and W_hh h + b_hh."""
    w_ih, w_hh, *biases = weights
    b_ih, b_hh = biases or (w_ih.new_zeros(len(w_ih)), w_hh.new_zeros(len(w_hh)))
    return x @ w_ih.T + b_ih, h @ w_hh.T + b_hh


def original_gru_step(x: Tensor, states: States, weights: list[Tensor]) -> States:
    (h,) = states
    (x_r, x_z, x_n), (h_r, h_z, _) = (p.chunk(3, -1) for p in _products(x, h, weights))
    r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
    *_, h_n = _products(x, r * h, weights)[1].chunk(3, -1)
    n = torch.tanh(x_n + h_n)
    return ((1 - z) * n + z * h,)


def coupled_lstm_step(x: Tensor, states: States, weights: list[Tensor]) -> States:
    h, c = states
    f, g, o = sum(_products(x, h, weights)).chunk(3, -1)  # type: ignore[union-attr]
    f = torch.sigmoid(f)
    c = f * c + (1 - f) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _states(hx: Any, *zeros: Tensor) -> States:
    return zeros if hx is None else hx if isinstance(hx, tuple) else (hx,)


def _as_torch(states: States) -> Any:
    return states[0] if len(states) == 1 else states


def run_layers(module: nn.RNNBase, step: Any, count: int, input: Tensor, hx: Any) -> Any:
    """All layers and directions of a module, with ``count`` states, step by step."""
    x = input.transpose(0, 1) if module.batch_first else input
    directions = 2 if module.bidirectional else 1
    zeros = x.new_zeros(module.num_layers * directions, x.shape[1], module.hidden_size)
    first = _states(hx, *(zeros,) * count)
    weights: list[list[Tensor]] = module.all_weights  # type: ignore[assignment]
    last: list[States] = []
    for layer in range(module.num_layers):
        outputs = []
        for k in range(layer * directions, (layer + 1) * directions):
            steps = reversed(range(len(x))) if k % directions else range(len(x))
            states, h = tuple(s[k] for s in first), {}
            for t in steps:
                states = step(x[t], states, weights[k])
                h[t] = states[0]
            outputs.append(torch.stack([h[t] for t in range(len(x))]))
            last.append(states)
        x = torch.cat(outputs, -1)
    stacked = tuple(torch.stack(states) for states in zip(*last, strict=True))
    return x.transpose(0, 1) if module.batch_first else x, _as_torch(stacked)


class OriginalGRU(nn.GRU):
    def forward(self, input: Any, hx: Any = None) -> Any:
        return run_layers(self, original_gru_step, 1, input, hx)


class OriginalGRUCell(nn.GRUCell):
    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        states = _states(hx, input.new_zeros(len(input), self.hidden_size))
        return original_gru_step(input, states, list(self.parameters()))[0]


class CoupledLSTM(rnnfast.LSTM):
    """Only its parameters are rnnfast's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, coupled_gates=True, **kwargs)

    def forward(self, input: Any, hx: Any = None) -> Any:  # type: ignore[override]
        return run_layers(self, coupled_lstm_step, 2, input, hx)


class CoupledLSTMCell(rnnfast.LSTMCell):
    """Only its parameters are rnnfast's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, coupled_gates=True, **kwargs)

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        states = _states(hx, *(input.new_zeros(len(input), self.hidden_size),) * 2)
        return coupled_lstm_step(input, states, list(self.parameters()))
