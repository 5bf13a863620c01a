"""The paths of a call, for layers and cells: the fast path, and the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..stack import autograd, checks, cuda_plans, ops, packed_weights, sequences
from ..stack.config import CELLS, Inputs, StackConfig, stack_config
from ..stack.precision import Precision

__all__ = ["Fitting", "Fused", "State", "forward_result"]

State = Tensor | tuple[Tensor, Tensor] | None


def _states_of(hx: Any, has_c: bool) -> Any:
    """``(h0, c0)``, or None if ``hx`` does not have the right type."""
    if hx is None:
        return None, None
    if not has_c:
        return (hx, None) if type(hx) in checks.PLAIN_TYPES else None
    if type(hx) not in (tuple, list) or len(hx) != 2:
        return None
    plain = type(hx[0]) in checks.PLAIN_TYPES and type(hx[1]) in checks.PLAIN_TYPES
    return hx if plain else None


def _gpu_of(input: Any) -> list[torch.device]:
    """The GPU of an input, if it is on one and its random state can be read.

    The state cannot be read while a CUDA graph is captured.
    """
    device = getattr(input.data if isinstance(input, PackedSequence) else input, "device", None)
    if not isinstance(device, torch.device) or device.type != "cuda":
        return []
    return [] if torch.cuda.is_current_stream_capturing() else [device]


def forward_result(y: Any, h_n: Any, c_n: Any, cell_states: Any) -> Any:
    """What ``forward`` returns; ``h_n`` is None for a cell module, ``c_n`` without a cell state."""
    if h_n is None:
        return y if c_n is None else (y, c_n)
    if c_n is None:
        return y, h_n
    return (y, (h_n, c_n)) if cell_states is None else (y, (h_n, c_n), cell_states)


class Fitting(NamedTuple):
    """The tensors of a call whose shapes fit the module."""

    data: Tensor
    states: tuple[Any, ...]  # empty without initial states
    batch_sizes: Tensor | None


class Fused(torch.nn.Module):
    """The base of all layers and cells. It adds no state."""

    _dims: int  # number of dimensions of a batched input
    hidden_size: int
    batch_first: bool  # only layers have it, and only layers take resets
    #: The weights of a layer in torch.nn's own code. A program may write other tensors to this list.
    _flat_weights: Any = None

    def _cell(self) -> str:
        """The cell's name in the table of cells."""
        raise NotImplementedError

    def _config(
        self, cell_states: bool = False, make: Callable[..., StackConfig] = StackConfig
    ) -> StackConfig:
        raise NotImplementedError

    @property
    def _has_c(self) -> bool:
        return CELLS[self._cell()].has_c

    def _beyond_torch(self) -> str | None:
        """The option that torch.nn's class lacks, as text; None if the module uses no such option."""
        return None

    def _run_torch(self, input: Any, hx: Any) -> Any:
        """Run torch's own module, whose exceptions say what is wrong with the arguments."""
        return super().forward(input, hx)

    def _forward_directly(
        self,
        input: Tensor,
        hx: Any,
        names: Sequence[str],
        lengths: Tensor | None = None,
        reset: Any = None,
        cell_states: bool = False,
    ) -> Any:
        """Run a call that needs no conversion, with little overhead; None and no effect for others.

        ``names`` are the names of the weights, in torch's order.
        """
        config = self._config(cell_states, stack_config)
        if cell_states and not config.has_c:
            return None
        parameters, features, flat = self._parameters, self.input_size, self._flat_weights
        if not torch.is_grad_enabled():
            packed = packed_weights.packed(self, config, names) if packed_weights.HELD else None
            inputs = (input, hx, parameters, names, lengths, reset, flat)
            return ops.call_module(config, inputs, self._dims, features, packed)
        try:
            weights: list[Any] = [parameters[name] for name in names]
        except KeyError:  # a parametrization computes the weight at each access
            return None
        if flat is not None and not all(map(is_, flat, weights)):
            return None
        if input.is_nested or input.dim() != self._dims or input.size(-1) != features:
            return None
        if input.is_cuda and not self._has_cuda_kernels():
            return None
        states = _states_of(hx, config.has_c)
        if states is None:
            return None
        h0, c0 = states
        outputs = autograd.stack(config, Inputs(input, h0, c0, weights, lengths, reset))
        return None if outputs is None else forward_result(*outputs[:4])

    def _forward_unbatched(
        self, input: Tensor, hx: Any, names: Sequence[str], cell_states: bool = False
    ) -> Any:
        """:meth:`_forward_directly` for an input that may lack the dimension of the batch."""
        cell = CELLS.get(self._cell())
        states = None if cell is None else _states_of(hx, cell.has_c)
        if cell is None or states is None or input.is_nested or input.dim() != self._dims - 1:
            return None
        of_input, of_states = self._batch_dims()
        h0, c0 = (s if s is None else s.unsqueeze(of_states) for s in states)
        hx = hx if hx is None else (h0, c0) if cell.has_c else h0
        batched = input.unsqueeze(of_input)
        result = self._forward_directly(batched, hx, names, cell_states=cell_states)
        return None if result is None else self._without_batch(result)

    def _batch_dims(self) -> tuple[int, int]:
        """The dimension of the batch in the input, and in the states."""
        if self._dims == 2:
            return 0, 0
        return 0 if self.batch_first else 1, 1

    def _without_batch(self, result: Any) -> Any:
        """The result of ``forward`` for a batch of one row, without the dimension of the batch."""
        of_input, of_states = self._batch_dims()

        def squeezed(states: Any) -> Any:
            if isinstance(states, tuple):
                return tuple(s.squeeze(of_states) for s in states)
            return states.squeeze(of_states)

        if self._dims == 2:
            return squeezed(result)
        y, states, *every_c = result
        return (y.squeeze(of_input), squeezed(states), *(c.squeeze(of_input) for c in every_c))

    def _weights(self) -> list[Any]:
        """The weights in torch's order, for a call outside of the fast path.

        A call reads them once: a parametrization computes a weight at each access.
        """
        raise NotImplementedError

    def _fitting(self, input: Any, hx: Any) -> Fitting | None:
        """The data, the states and the batch sizes, or None if a shape does not fit."""
        raise NotImplementedError

    def _precision(
        self, data: Tensor, states: Any, batch_sizes: Tensor | None, weights: list[Any]
    ) -> Precision | None:
        raise NotImplementedError

    def _run(
        self,
        input: Any,
        hx: State,
        weights: list[Any],
        *,
        covered: Precision | None,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        cell_states: bool = False,
    ) -> Any:
        """Run a call for which :meth:`_covers` returned ``covered``; if None, in torch's operators."""
        raise NotImplementedError

    def _covers(self, input: Any, hx: Any, weights: list[Any]) -> Precision | None:
        """The dtypes in which the kernels compute a call; None if they do not take it."""
        if not (checks.traced() or checks.plain_call()):
            return None
        tensors = self._fitting(input, hx)
        chosen = None if tensors is None else self._precision(*tensors, weights)
        if tensors is None or chosen is None:
            return None
        data = tensors.data
        takes = not data.is_cuda or cuda_plans.takes(self._config(), data, self.hidden_size)
        return chosen if takes else None

    def _has_cuda_kernels(self) -> bool:
        return self._dims == 3 and cuda_plans.is_on()  # not for cells

    def _is_torchs(self, input: Any) -> bool:
        """Whether torch.nn's own code computes a call on a GPU, with no argument that torch.nn lacks.

        This asks as little as possible: the GPU waits for the answer.
        """
        if not getattr(input, "is_cuda", False) or self._has_cuda_kernels():
            return False
        return checks.plain_call() and self._beyond_torch() is None

    def _forward_as_torch(self, input: Any, hx: Any) -> Any:
        """A call with torch.nn's own arguments alone."""
        weights, outputs = self._weights(), None
        covered = self._covers(input, hx, weights)
        if covered is not None:
            outputs = self._run(input, hx, weights, covered=covered)
        return self._uncovered(input, hx, weights) if outputs is None else outputs

    def _uncovered(self, input: Any, hx: Any, weights: list[Any]) -> Any:
        """A call that no kernel covers, also with invalid input: torch's own result or exception.

        Under a transform the reference computes the call, since torch's recurrent operators do not
        support vmap, and not all of them support forward-mode differentiation.
        """
        if self._beyond_torch() is not None:
            return self._forward_further(input, hx, None, False)
        if checks.transformed() and self._fitting(input, hx) is not None:
            return self._run(input, hx, weights, covered=None)
        return super().forward(input, hx)

    def _forward_further(self, input: Any, hx: Any, reset: Any, cell_states: bool) -> Any:
        """A call with arguments that torch.nn lacks; in torch's operators if no kernel covers it."""
        weights = self._weights()
        covered = self._covers(input, hx, weights)
        if covered is None and (checks.plain_call() or self._fitting(input, hx) is None):
            # torch raises its exception if input or hx is invalid.
            with torch.no_grad(), torch.random.fork_rng(_gpu_of(input)):
                self._run_torch(input, hx)
        if reset is not None:
            reset = sequences.reset_rows(input, reset, self.batch_first)
        outputs, options = None, {"reset": reset, "cell_states": cell_states}
        if covered is not None:
            outputs = self._run(input, hx, weights, covered=covered, **options)
        if outputs is None:
            if self._dims == 3 and input.is_cuda and checks.plain_call():
                extra = "reset=" if reset is not None else self._beyond_torch()
                cuda_plans.warn_of_loop(extra or "return_cell_states=True", input.data.device)
            outputs = self._run(input, hx, weights, covered=None, **options)
        return outputs
