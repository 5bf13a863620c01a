"""The shortest way of a call, which layers and cells share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..stack import autograd, checks, ops, packed_weights
from ..stack.config import CELLS, Inputs, StackConfig, stack_config

__all__ = ["Fused", "State", "returned"]

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


class Fused(torch.nn.Module):
    """What all layers and cells share. It adds no state."""

    _dims: int  # of an input that is a batch

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
