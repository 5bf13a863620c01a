"""The ways of a call, which layers and cells share: the shortest one, and all others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..stack import autograd, checks, ops, packed_weights, sequences
from ..stack.config import CELLS, Inputs, StackConfig, stack_config
from ..stack.precision import Precision

__all__ = ["Fitting", "Fused", "State", "returned"]

State = Tensor | tuple[Tensor, Tensor] | None


def _states_of(hx: Any, has_c: bool) -> Any:
    """``h0`` and ``c0``, or None where ``hx`` is not of the kind that it must be."""
    if hx is None:
        return None, None
    if not has_c:
        return (hx, None) if type(hx) in checks.PLAIN_TYPES else None
    if type(hx) not in (tuple, list) or len(hx) != 2:
        return None
    plain = type(hx[0]) in checks.PLAIN_TYPES and type(hx[1]) in checks.PLAIN_TYPES
    return hx if plain else None


def returned(y: Any, h_n: Any, c_n: Any, cell_states: Any) -> Any:
    """What ``forward`` returns; ``h_n`` is None for a cell, ``c_n`` where there is no cell state."""
    if h_n is None:
        return y if c_n is None else (y, c_n)
    if c_n is None:
        return y, h_n
    return (y, (h_n, c_n)) if cell_states is None else (y, (h_n, c_n), cell_states)


class Fitting(NamedTuple):
    """Arguments whose shapes fit."""

    data: Tensor
    states: tuple[Any, ...]  # none, where no state was given
    batch_sizes: Tensor | None


class Fused(torch.nn.Module):
    """What all layers and cells share. It adds no state."""

    _dims: int  # of an input that is a batch
    hidden_size: int
    batch_first: bool  # a layer's; a cell has no resets

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
        """The option for which torch.nn has no such module."""
        return None

    def _run_torch(self, input: Any, hx: Any) -> Any:
        """Torch's module; its exceptions tell what is wrong with the arguments."""
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
        """The usual call, at the least cost; None, having done nothing, where it is another.

        ``names`` are those of the weights, in torch's order.
        """
        config = self._config(cell_states, stack_config)
        if cell_states and not config.has_c:
            return None
        parameters, features = self._parameters, self.input_size
        if not torch.is_grad_enabled():
            held = packed_weights.HELD
            packed = packed_weights.packed(self, config, names) if held else None
            inputs = (input, hx, parameters, names, lengths, reset)
            return ops.call_module(config, inputs, self._dims, features, packed)
        try:
            weights: list[Any] = [parameters[name] for name in names]
        except KeyError:  # computed at each access (a parametrization)
            return None
        if input.is_nested or input.dim() != self._dims or input.size(-1) != features:
            return None
        states = _states_of(hx, config.has_c)
        if states is None:
            return None
        h0, c0 = states
        outputs = autograd.stack(config, Inputs(input, h0, c0, weights, lengths, reset))
        return None if outputs is None else returned(*outputs[:4])

    def _refresh(self) -> None:
        """Before a call that is not the usual one."""

    def _fitting(self, input: Any, hx: Any) -> Fitting | None:
        """None if a shape does not fit."""
        raise NotImplementedError

    def _precision(self, data: Tensor, states: Any, batch_sizes: Tensor | None) -> Precision | None:
        raise NotImplementedError

    def _run(
        self,
        input: Any,
        hx: State,
        *,
        fused: bool,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        cell_states: bool = False,
    ) -> Any:
        """Whatever :meth:`_covers` accepts; with ``fused=False`` in torch's operators."""
        raise NotImplementedError

    def _covers(self, input: Any, hx: Any) -> bool:
        if not (checks.traced() or checks.plain_call()):
            return False
        fitting = self._fitting(input, hx)
        if fitting is None or self._precision(*fitting) is None:
            return False
        return ops.takes(self._config(), fitting[0], self.hidden_size)

    def _forward_as_torch(self, input: Any, hx: Any) -> Any:
        """What torch.nn offers too."""
        self._refresh()
        outputs = self._run(input, hx, fused=True) if self._covers(input, hx) else None
        return self._uncovered(input, hx) if outputs is None else outputs

    def _uncovered(self, input: Any, hx: Any) -> Any:
        """What no kernel covers, bad input included: torch's own answer, or its exception.

        But torch's own recurrent operators know neither vmap nor, all of them, forward mode.
        """
        if self._beyond_torch() is not None:
            return self._forward_further(input, hx, None, False)
        if checks.transformed() and self._fitting(input, hx) is not None:
            return self._run(input, hx, fused=False)
        return super().forward(input, hx)

    def _forward_further(self, input: Any, hx: Any, reset: Any, cell_states: bool) -> Any:
        """What torch.nn does not offer; on torch's operators where the kernels do not cover it."""
        self._refresh()
        covered = self._covers(input, hx)
        if not covered and (checks.plain_call() or self._fitting(input, hx) is None):
            # torch knows what is wrong with the other arguments.
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                self._run_torch(input, hx)
        if reset is not None:
            reset = sequences.reset_rows(input, reset, self.batch_first)
        outputs = None
        if covered:
            outputs = self._run(input, hx, fused=True, reset=reset, cell_states=cell_states)
        if outputs is None:
            outputs = self._run(input, hx, fused=False, reset=reset, cell_states=cell_states)
        return outputs
