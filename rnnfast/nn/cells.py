"""LSTMCell, GRUCell and RNNCell, as subclasses of torch.nn's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..stack import checks, ops, packed_weights, precision
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
        """As torch's ``forward``.

        Args:
            input (Tensor): ``[B, I]`` or ``[I]``.
            hx (Tensor | tuple[Tensor, Tensor] | None): the states before the step: h ``[B, H]`` or
                ``[H]``, for an LSTMCell the tuple (h, c) of two such tensors. None means zeros.

        Returns:
            Tensor | tuple[Tensor, Tensor]: the states after the step, h, for an LSTMCell (h, c), with
                the shapes of the states before the step.

        Raises:
            RuntimeError: a shape, a dtype or a device does not fit; the errors are torch's own.
            ValueError: ``input`` has more than two dimensions.
        """
        is_plain = type(input) is Tensor and checks.plain_call() and not precision.may_autocast()
        if is_plain and self.hidden_size > 0:
            names = self._names()
            outputs = self._forward_directly(input, hx, names)
            if outputs is None:
                outputs = self._forward_unbatched(input, hx, names)
            if outputs is not None:
                return outputs
        if self._is_torchs(input):
            return super().forward(input, hx)
        return self._forward_as_torch(input, hx)

    def _covers(self, input: Any, hx: Any, weights: list[Any]) -> Precision | None:
        return None if getattr(input, "is_cuda", False) else super()._covers(input, hx, weights)

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

    def _precision(
        self, data: Tensor, states: Any, batch_sizes: Tensor | None, weights: list[Any]
    ) -> Precision | None:
        is_lowered = self._is_lowered
        return precision.choose(data, (*states,), weights, is_lowered, is_lowered)

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

    def _run(
        self, input: Tensor, hx: State, weights: list[Any], *, covered: Precision | None, **_: Any
    ) -> Any:
        is_batched = input.dim() == 2
        states = (None, None) if hx is None else hx if isinstance(hx, tuple | list) else (hx, None)
        x, h0, c0 = (t if t is None or is_batched else t[None] for t in (input, *states))
        chosen = covered or self._precision(input, states, None, weights)
        config = self._config()
        weights, packed = packed_weights.converted(self, config, weights, covered)
        inputs = ops.readable(Inputs(x, h0, c0, weights))
        outputs = recurrent_in(chosen, config, inputs, fused=covered is not None, packed=packed)
        if outputs is None:
            return None
        result = forward_result(outputs.y, None, outputs.c_n, None)
        return result if is_batched else self._without_batch(result)


class RNNCell(_RecurrentCell, torch.nn.RNNCell):
    """One step of the Elman network: ``torch.nn.RNNCell`` on fused kernels.

    ```math
    h' = f(W_{ih} x + b_{ih} + W_{hh} h + b_{hh})
    ```

    f is tanh, or ReLU with ``nonlinearity="relu"``.

    Source: Elman 1990, "Finding Structure in Time".

    Args:
        input_size (int): I, the number of features of the input.
        hidden_size (int): H, the number of hidden units.
        bias (bool): whether the cell has biases, True by default.
        nonlinearity (str): "tanh", the default, or "relu". A call with another one raises RuntimeError.
        device (torch.device): the device of the parameters.
        dtype (torch.dtype): the dtype of the parameters.
    """

    _is_lowered = True

    def _cell(self) -> str:
        return f"rnn_{self.nonlinearity}"

    def _fitting(self, input: Any, hx: Any) -> Fitting | None:
        return super()._fitting(input, hx) if self.nonlinearity in ("tanh", "relu") else None


class LSTMCell(CoupledGates, _RecurrentCell, torch.nn.LSTMCell):
    """One step of long short-term memory: ``torch.nn.LSTMCell`` on fused kernels, and one more keyword.

    ```math
    i = σ(W_{ii} x + b_{ii} + W_{hi} h + b_{hi})
    f = σ(W_{if} x + b_{if} + W_{hf} h + b_{hf})
    g = tanh(W_{ig} x + b_{ig} + W_{hg} h + b_{hg})
    o = σ(W_{io} x + b_{io} + W_{ho} h + b_{ho})
    c' = f ⊙ c + i ⊙ g
    h' = o ⊙ tanh(c')
    ```

    σ is the logistic function, and ⊙ multiplies element by element.

    With ``coupled_gates=True`` the input gate is 1 - f. The cell has no gate i, and no weights for it:

    ```math
    c' = f ⊙ c + (1 - f) ⊙ g
    ```

    Sources:

    - Gates i and o, cell state c: Hochreiter and Schmidhuber 1997, "Long Short-Term Memory".
    - Forget gate f: Gers, Schmidhuber and Cummins 2000, "Learning to Forget".
    - Coupled gates: Greff et al. 2017, arXiv 1503.04069, the variant "CIFG".

    Args:
        input_size (int): I, the number of features of the input.
        hidden_size (int): H, the number of hidden units.
        bias (bool): whether the cell has biases, True by default.
        coupled_gates (bool): whether the input gate is 1 - f; False, the default, is torch's LSTMCell.
            With True the weights and biases have ``3 * H`` rows, for the gates f, g and o.
        device (torch.device): the device of the parameters.
        dtype (torch.dtype): the dtype of the parameters.

    Raises:
        TypeError: ``coupled_gates`` is not a bool.
    """

    def _run_torch(self, input: Any, hx: Any) -> Any:
        if not self.coupled_gates:
            return super()._run_torch(input, hx)
        factory_kwargs = {"device": self.weight_hh.device, "dtype": self.weight_hh.dtype}
        bias = bool(self.bias)
        return torch.nn.LSTMCell(self.input_size, self.hidden_size, bias, **factory_kwargs)(input, hx)


class GRUCell(ResetAfter, _RecurrentCell, torch.nn.GRUCell):
    """One step of the gated recurrent unit: ``torch.nn.GRUCell`` on fused kernels; one more keyword.

    ```math
    r = σ(W_{ir} x + b_{ir} + W_{hr} h + b_{hr})
    z = σ(W_{iz} x + b_{iz} + W_{hz} h + b_{hz})
    n = tanh(W_{in} x + b_{in} + r ⊙ (W_{hn} h + b_{hn}))
    h' = (1 - z) ⊙ n + z ⊙ h
    ```

    σ is the logistic function, and ⊙ multiplies element by element. The reset gate r applies after the
    product with the recurrent weights. With ``reset_after=False`` it applies to h before the product:

    ```math
    n = tanh(W_{in} x + b_{in} + W_{hn} (r ⊙ h) + b_{hn})
    ```

    Both forms have the same parameters.

    Sources:

    - r, z, h, and n with ``reset_after=False``: Cho et al. 2014, arXiv 1406.1078, equations 5 to 8.
    - n with ``reset_after=True``: cuDNN's and torch's form. Keras named the option.

    Args:
        input_size (int): I, the number of features of the input.
        hidden_size (int): H, the number of hidden units.
        bias (bool): whether the cell has biases, True by default.
        reset_after (bool): whether the reset gate applies after the recurrent product. True, the
            default, is torch's GRUCell. False is the original GRU.
        device (torch.device): the device of the parameters.
        dtype (torch.dtype): the dtype of the parameters.

    Raises:
        TypeError: ``reset_after`` is not a bool.
    """
