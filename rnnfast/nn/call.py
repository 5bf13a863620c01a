"""The shortest way of a call, which layers and cells share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import autograd, checks, ops, packing

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


def returned(y: Any, h_n: Any, c_n: Any, every_c: Any, cells: bool) -> Any:
    """What ``forward`` returns; ``h_n`` is None for a cell, ``c_n`` where there is no cell state."""
    if h_n is None:
        return y if c_n is None else (y, c_n)
    if c_n is None:
        return y, h_n
    return (y, (h_n, c_n), every_c) if cells else (y, (h_n, c_n))


class Fused(torch.nn.Module):
    """What all layers and cells share. It adds no state."""

    _dims: int  # of an input that is a batch

    def _cell(self) -> str:
        """The cell's name in the table of cells."""
        raise NotImplementedError

    def _spec(self, make: Callable[..., ops.Spec] = ops.Spec) -> ops.Spec:
        raise NotImplementedError

    def _names(self) -> Sequence[str]:
        """The names of the weights, in torch's order."""
        raise NotImplementedError

    @property
    def _has_c(self) -> bool:
        return ops.CELLS[self._cell()].has_c

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
        lengths: Tensor | None = None,
        reset: Any = None,
        cells: bool = False,
    ) -> Any:
        """The usual call, at the least cost; None, having done nothing, where it is another."""
        spec = self._spec(ops.spec)
        names, parameters = self._names(), self._parameters
        features: Any = self.input_size
        if not torch.is_grad_enabled():
            packed = packing.packed(self, spec, names) if packing.HELD else None
            return ops.call_module(
                spec, lengths, input, self._dims, features, hx, parameters, names, reset, cells, packed
            )
        try:
            weights: list[Any] = [parameters[name] for name in names]
        except KeyError:  # computed at each access (a parametrization)
            return None
        if input.is_nested or input.dim() != self._dims or input.size(-1) != features:
            return None
        has_c = spec.has_c
        states = _states_of(hx, has_c)
        if states is None or (cells and not has_c):
            return None
        h0, c0 = states
        outputs = autograd.stack(spec, lengths, input, h0, c0, weights, reset, cells)
        return None if outputs is None else returned(*outputs[:4], cells)
