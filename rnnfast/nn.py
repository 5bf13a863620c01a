"""LSTM, GRU, RNN and their cells, as subclasses of torch.nn's.

A call that the kernels cover runs on them; any other (a packed sequence, a projection, half precision,
another device, a transform, bad input) runs torch's own ``forward``, so its answers and its exceptions
are torch's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import checks, functional

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"]

State = Tensor | tuple[Tensor, Tensor] | None


class _Recurrent(torch.nn.RNNBase):
    """What the three modules share. It adds no state: a torch.nn module can become one in place."""

    def _cell(self) -> str:
        return {"LSTM": "lstm", "GRU": "gru", "RNN_TANH": "rnn_tanh", "RNN_RELU": "rnn_relu"}[self.mode]

    def forward(self, input: Any, hx: Any = None) -> Any:
        self._update_flat_weights()
        if not self._covers(input, hx):
            return super().forward(input, hx)
        return self._run(input, hx, fused=True)

    def _covers(self, input: Any, hx: Any) -> bool:
        if not isinstance(input, Tensor) or self.proj_size > 0 or not checks.plain_call():
            return False
        dims = input.dim()
        if dims not in (2, 3) or input.size(-1) != self.input_size:
            return False
        states: tuple[Any, ...] = ()
        if hx is not None:
            states = hx if self.mode == "LSTM" else (hx,)
            if not isinstance(states, tuple | list) or len(states) != (2 if self.mode == "LSTM" else 1):
                return False
            layers = self.num_layers * (2 if self.bidirectional else 1)
            shape = [layers, self.hidden_size]
            if dims == 3:
                shape.insert(1, input.size(0 if self.batch_first else 1))
            if not all(isinstance(s, Tensor) and list(s.shape) == shape for s in states):
                return False
        # No steps at all: torch says so.
        steps = input.size(1 if dims == 3 and self.batch_first else 0)
        return steps > 0 and checks.plain_tensors(input, (*states, *self._flat_weights))

    def _run(self, input: Tensor, hx: State, *, fused: bool) -> Any:
        is_lstm = self.mode == "LSTM"
        batched = input.dim() == 3
        batch_dim = 0 if self.batch_first else 1
        states = (None, None) if hx is None else hx if isinstance(hx, tuple | list) else (hx, None)
        h0, c0 = (s if batched or s is None else s.unsqueeze(1) for s in states)
        y, h_n, c_n = functional.recurrent(
            self._cell(),
            input if batched else input.unsqueeze(batch_dim),
            h0,
            c0,
            self._flat_weights,  # type: ignore[arg-type]
            bias=self.bias,
            num_layers=self.num_layers,
            dropout=self.dropout,
            training=self.training,
            bidirectional=self.bidirectional,
            batch_first=self.batch_first,
            fused=fused,
        )
        if not batched:
            y, h_n = y.squeeze(batch_dim), h_n.squeeze(1)
            c_n = None if c_n is None else c_n.squeeze(1)
        return (y, (h_n, c_n)) if is_lstm else (y, h_n)


class RNN(_Recurrent, torch.nn.RNN):
    """:class:`torch.nn.RNN` on fused kernels; the same constructor, state and behaviour."""


class LSTM(_Recurrent, torch.nn.LSTM):
    """:class:`torch.nn.LSTM` on fused kernels; the same constructor, state and behaviour."""


class GRU(_Recurrent, torch.nn.GRU):
    """:class:`torch.nn.GRU` on fused kernels; the same constructor, state and behaviour.

    One more keyword, ``reset_after`` (Keras's name). True, the default, is torch's and cuDNN's GRU:
    ``n = tanh(W_in x + b_in + r * (W_hn h + b_hn))``. False is the original one (Cho et al. 2014,
    arXiv 1406.1078, eq. 8): ``n = tanh(W_in x + b_in + W_hn (r * h) + b_hn)``. Both have the same
    parameters.
    """

    reset_after: bool = True

    def __init__(self, *args: Any, reset_after: bool = True, **kwargs: Any) -> None:
        _check_reset_after(reset_after)
        super().__init__(*args, **kwargs)
        if not reset_after:
            self.reset_after = False

    def _cell(self) -> str:
        return "gru" if self.reset_after else "gru_original"

    def forward(self, input: Any, hx: Any = None) -> Any:
        if self.reset_after:
            return super().forward(input, hx)
        self._update_flat_weights()
        if self._covers(input, hx):
            return self._run(input, hx, fused=True)
        return self._original_eager(input, hx)

    def _original_eager(self, input: Any, hx: Any) -> Any:
        with torch.no_grad():  # torch has no such cell, but it knows what is wrong with the arguments
            torch.nn.GRU.forward(self, input, hx)
        if not isinstance(input, PackedSequence):
            return self._run(input, hx, fused=False)
        raise NotImplementedError(
            "GRU(reset_after=False) does not take a PackedSequence yet; pad it "
            "(torch.nn.utils.rnn.pad_packed_sequence) or use reset_after=True"
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.reset_after else ", reset_after=False")


def _check_reset_after(reset_after: object) -> None:
    if not isinstance(reset_after, bool):
        raise TypeError(f"reset_after should be of type bool, got: {type(reset_after).__name__}")


class _RecurrentCell(torch.nn.RNNCellBase):
    """What the three cells share: one step, ``[B, I]`` or ``[I]``."""

    def _cell(self) -> str:
        raise NotImplementedError

    def forward(self, input: Any, hx: Any = None) -> Any:
        if not self._covers(input, hx):
            return super().forward(input, hx)
        return self._run(input, hx, fused=True)

    def _covers(self, input: Any, hx: Any) -> bool:
        if not isinstance(input, Tensor) or not checks.plain_call():
            return False
        if input.dim() not in (1, 2) or input.size(-1) != self.input_size:
            return False
        states: tuple[Any, ...] = ()
        if hx is not None:
            states = hx if self._has_c else (hx,)
            if not isinstance(states, tuple | list) or len(states) != (2 if self._has_c else 1):
                return False
            shape = [*input.shape[:-1], self.hidden_size]
            if not all(isinstance(s, Tensor) and list(s.shape) == shape for s in states):
                return False
        return checks.plain_tensors(input, (*states, *self._weights()))

    @property
    def _has_c(self) -> bool:
        return self._cell() == "lstm"

    def _weights(self) -> list[Tensor]:
        weights = [self.weight_ih, self.weight_hh]
        return [*weights, self.bias_ih, self.bias_hh] if self.bias else weights

    def _run(self, input: Tensor, hx: State, *, fused: bool) -> Any:
        batched = input.dim() == 2
        states = (None, None) if hx is None else hx if isinstance(hx, tuple | list) else (hx, None)
        h0, c0 = (
            None if s is None else s.view(1, -1, self.hidden_size) if not batched else s[None]
            for s in states
        )
        _, h_n, c_n = functional.recurrent(
            self._cell(),
            input[None] if batched else input[None, None],
            h0,
            c0,
            self._weights(),
            bias=self.bias,
            num_layers=1,
            dropout=0.0,
            training=False,
            bidirectional=False,
            batch_first=False,
            fused=fused,
        )
        h1, c1 = (None if s is None else s[0] if batched else s[0, 0] for s in (h_n, c_n))
        return (h1, c1) if self._has_c else h1


class RNNCell(_RecurrentCell, torch.nn.RNNCell):
    """:class:`torch.nn.RNNCell` on fused kernels; the same constructor, state and behaviour."""

    def _cell(self) -> str:
        return "rnn_" + self.nonlinearity

    def _covers(self, input: Any, hx: Any) -> bool:
        return self.nonlinearity in ("tanh", "relu") and super()._covers(input, hx)


class LSTMCell(_RecurrentCell, torch.nn.LSTMCell):
    """:class:`torch.nn.LSTMCell` on fused kernels; the same constructor, state and behaviour."""

    def _cell(self) -> str:
        return "lstm"


class GRUCell(_RecurrentCell, torch.nn.GRUCell):
    """A fused :class:`torch.nn.GRUCell`, with the keyword ``reset_after`` of :class:`GRU`."""

    reset_after: bool = True

    def __init__(self, *args: Any, reset_after: bool = True, **kwargs: Any) -> None:
        _check_reset_after(reset_after)
        super().__init__(*args, **kwargs)
        if not reset_after:
            self.reset_after = False

    def _cell(self) -> str:
        return "gru" if self.reset_after else "gru_original"

    def forward(self, input: Any, hx: Any = None) -> Any:
        if self.reset_after or self._covers(input, hx):
            return super().forward(input, hx)
        with torch.no_grad():  # torch has no such cell, but it knows what is wrong with the arguments
            torch.nn.GRUCell.forward(self, input, hx)
        return self._run(input, hx, fused=False)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.reset_after else ", reset_after=False")
