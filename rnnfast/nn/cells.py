"""LSTMCell, GRUCell and RNNCell, as subclasses of torch.nn's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..stack import checks, ops, precision
from ..stack.config import Inputs, StackConfig
from ..stack.precision import Precision
from .call import Fitting, Fused, State, forward_result
from .keywords import CoupledGates, ResetAfter
from .route import recurrent_in

__all__ = ["GRUCell", "LSTMCell", "RNNCell"]

#: The names of a cell's weights, without and with biases.
_CELL_WEIGHTS = (("weight_ih", "weight_hh"), ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))


class _RecurrentCell(Fused, torch.nn.RNNCellBase):
    """The base of the three cells, which compute one step of ``[B, I]`` or ``[I]``."""

    _dims = 2
    _is_lowered = False  # whether autocast casts torch's cell to its lower-precision dtype

    def forward(self, input: Any, hx: Any = None) -> Any:
        """As torch's ``forward``: ``input`` ``[B, I]`` or ``[I]``, states ``[B, H]`` or ``[H]``."""
        is_plain = type(input) is Tensor and checks.plain_call() and not precision.may_autocast()
        if is_plain and self.hidden_size > 0:
            outputs = self._forward_directly(input, hx, self._names())
            if outputs is not None:
                return outputs
        return self._forward_as_torch(input, hx)

    def _fitting(self, input: Any, hx: Any) -> Fitting | None:
        if not isinstance(input, Tensor) or input.dim() not in (1, 2):
            return None
        if input.size(-1) != self.input_size or self.hidden_size < 1:
            return None
        if hx is None:
            return Fitting(input, (), None)
        states = hx if self._has_c else (hx,)
        if not isinstance(states, tuple | list) or len(states) != (2 if self._has_c else 1):
            return None
        shape = [*input.shape[:-1], self.hidden_size]
        if not all(isinstance(s, Tensor) and list(s.shape) == shape for s in states):
            return None
        return Fitting(input, (*states,), None)

    def _precision(self, data: Tensor, states: Any, batch_sizes: Tensor | None) -> Precision | None:
        is_lowered = self._is_lowered
        return precision.choose(data, (*states,), self._weights(), is_lowered, is_lowered)

    def _config(
        self, cell_states: bool = False, make: Callable[..., StackConfig] = StackConfig
    ) -> StackConfig:
        bias = bool(self.bias)  # torch accepts any object as bias
        float32 = precision.of_float32(may_trace=make is StackConfig)
        return make(self._cell(), 1, 1, bias, precision=float32)

    def _names(self) -> tuple[str, ...]:
        return _CELL_WEIGHTS[bool(self.bias)]

    def _weights(self) -> list[Any]:
        return [getattr(self, name) for name in self._names()]

    def _run(self, input: Tensor, hx: State, *, fused: bool, **_: Any) -> Any:
        is_batched = input.dim() == 2
        states = (None, None) if hx is None else hx if isinstance(hx, tuple | list) else (hx, None)
        x, h0, c0 = (t if t is None or is_batched else t[None] for t in (input, *states))
        inputs = Inputs(x, h0, c0, self._weights())
        inputs = inputs.with_tensors(map(ops.rows, inputs.tensors))
        outputs = recurrent_in(
            self._precision(input, states, None), self._config(), inputs, fused=fused
        )
        if outputs is None:
            return None
        h1, c1 = (t if t is None or is_batched else t[0] for t in (outputs.y, outputs.c_n))
        return forward_result(h1, None, c1, None)


class RNNCell(_RecurrentCell, torch.nn.RNNCell):
    """:class:`torch.nn.RNNCell` on fused kernels; the same constructor, state and behaviour."""

    _is_lowered = True

    def _cell(self) -> str:
        return f"rnn_{self.nonlinearity}"

    def _fitting(self, input: Any, hx: Any) -> Fitting | None:
        return super()._fitting(input, hx) if self.nonlinearity in ("tanh", "relu") else None


class LSTMCell(CoupledGates, _RecurrentCell, torch.nn.LSTMCell):
    """:class:`torch.nn.LSTMCell` on fused kernels; the same constructor, state and behaviour.

    One more keyword, ``coupled_gates``, as for :class:`LSTM`.
    """

    def _run_torch(self, input: Any, hx: Any) -> Any:
        if not self.coupled_gates:
            return super()._run_torch(input, hx)
        factory_kwargs = {"device": self.weight_hh.device, "dtype": self.weight_hh.dtype}
        bias = bool(self.bias)
        return torch.nn.LSTMCell(self.input_size, self.hidden_size, bias, **factory_kwargs)(input, hx)


class GRUCell(ResetAfter, _RecurrentCell, torch.nn.GRUCell):
    """:class:`torch.nn.GRUCell` on fused kernels; the same constructor, state and behaviour.

    One more keyword, ``reset_after``, as for :class:`GRU`.
    """
