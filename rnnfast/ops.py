"""A stack of layers on torch tensors, as the kernels compute it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks
from ._native import _C
from .checks import PLAIN_TYPES

#: A cell's number in the extension's table, by name.
CELLS: dict[str, int] = {name: number for number, name in enumerate(_C.cells())}


class Spec(NamedTuple):
    """What a stack of layers is, beside its tensors; csrc/stack.h has their shapes."""

    cell: str
    layers: int
    directions: int
    bias: bool
    projected: bool
    batch_first: bool

    @property
    def weights_each(self) -> int:
        """How many weights one direction of one layer has."""
        return (4 if self.bias else 2) + self.projected

    def weights(self, flat: Sequence[Any], number: int) -> tuple[Any, Any, Any, Any, Any]:
        """w_ih, w_hh, b_ih, b_hh and w_hr of one direction of one layer, or None in their place."""
        w = flat[number * self.weights_each : (number + 1) * self.weights_each]
        return w[0], w[1], *(w[2:4] if self.bias else (None, None)), w[-1] if self.projected else None

    def widths(self, flat: Sequence[Tensor]) -> tuple[int, int]:
        """Of h and of the cell: R and H, which are the same unless h is projected."""
        outputs = flat[1].size(-1)
        return outputs, flat[self.weights_each - 1].size(-1) if self.projected else outputs


#: The same ones again, where a call must cost little; torch.compile does not like caches.
spec = cache(Spec)


class Outputs(NamedTuple):
    """What a stack returns."""

    y: Tensor
    h_n: Tensor | None  # None for a step, whose y it is
    c_n: Tensor | None
    cells: Tensor | None = None  # where they were asked for
    saved: Tensor | None = None  # what backward needs, likewise


class _Stacks(dict[Spec, Any]):
    """The extension's own description of each stack, made when it is first asked for."""

    def __missing__(self, spec: Spec) -> Any:
        cell, layers, directions, *rest = spec
        stack = self[spec] = _C.Stack(CELLS[cell], layers, directions, False, False, *rest)
        return stack


_STACKS = _Stacks()


def rows(t: Tensor | None) -> Tensor | None:
    """A tensor that the kernels can read: its last dimension contiguous. Copies only if it must."""
    if t is None or checks.traced():  # the operator looks again
        return t
    if checks.lazy(t):
        t = t.resolve_neg() if t.is_neg() else torch.zeros(t.shape, dtype=t.dtype, device="cpu")
    return t if t.size(-1) <= 1 or t.stride(-1) == 1 else t.contiguous()


def _as_tensor(memory: Any) -> Tensor:
    if memoryview(memory).nbytes == 0:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    return torch.frombuffer(memory, dtype=torch.uint8)


def saved_bytes_of_a_row(spec: Spec, dtype: torch.dtype, hidden: int, outputs: int) -> int:
    """The size of ``Outputs.saved`` for each row of ``x``."""
    memory = _STACKS[spec].new_saved(checks.DTYPES[dtype], 1, hidden, outputs)
    return memoryview(memory).nbytes


def forward(
    spec: Spec,
    batch_sizes: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Any],
    save: bool,
    reset: Tensor | None = None,
    cells: bool = False,
    packed: Any = None,
) -> Outputs | None:
    """Run a stack; None, having done nothing, where an argument is not what the kernels take.

    ``x`` is ``[T, B, I]``, ``[B, T, I]`` where ``spec.batch_first``, packed with ``batch_sizes``, or
    ``[B, I]`` for one step of one layer, whose states are ``[B, H]``. ``save`` asks for what backward
    needs. ``packed`` is None or from :func:`pack`, with the same weights. Where ``reset``, bools for
    the rows of ``x``, is true, a row's states are zero before that step. ``cells`` asks for the last
    layer's c after every step, ``[T, B, D * H]`` or as ``y`` is.
    """
    try:
        stack = _STACKS[spec]
    except KeyError:  # no such cell
        return None
    threads, new_saved = torch.get_num_threads(), _as_tensor if save else None
    try:
        found = stack.call(
            PLAIN_TYPES, threads, batch_sizes, reset, x, h0, c0, weights, cells, new_saved, packed
        )
    except ValueError as error:  # weights of another shape: torch raises RuntimeError
        raise RuntimeError(str(error)) from None
    return None if found is None else tuple.__new__(Outputs, found)


def call_module(
    spec: Spec,
    x: Any,
    dims: int,
    features: Any,
    hx: Any,
    parameters: dict[str, Any],
    names: Sequence[str],
    reset: Any,
    cells: bool,
    packed: Any,
) -> Any:
    """:func:`forward` without gradients for a module, from its states ``hx`` to what it returns.

    None also where a parameter is missing, or ``x`` has not ``dims`` dimensions and so many
    ``features``.
    """
    try:
        stack = _STACKS[spec]
    except KeyError:
        return None
    threads = torch.get_num_threads()
    try:
        return stack.call_module(
            PLAIN_TYPES, threads, x, dims, features, hx, parameters, names, reset, cells, packed
        )
    except ValueError as error:
        raise RuntimeError(str(error)) from None


def pack(spec: Spec, weights: list[Any]) -> Any:
    """The weights packed for :func:`forward`, or None where they are not what the kernels take."""
    w_ih = weights[0]
    try:
        return _STACKS[spec].pack(w_ih.new_zeros(1, 1, w_ih.size(-1)), weights)
    except (TypeError, ValueError, BufferError):
        return None


def backward(
    spec: Spec,
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    inputs: tuple[Tensor | None, ...],
    y: Tensor,
    saved: Tensor,
    grads: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of those ``inputs``, ``(x, h0, c0, *weights)``, that are ``wanted``; others None.

    ``grads`` are those of y, h_n, c_n and cells; None means zeros.
    """
    found = [
        torch.empty_like(t, memory_format=torch.contiguous_format) if wants and t is not None else None
        for t, wants in zip(inputs, wanted, strict=True)
    ]
    given = tuple(map(rows, grads))
    stack, threads = _STACKS[spec], torch.get_num_threads()
    written = (*found[:3], found[3:])

    def run(y: Any, x: Any, h0: Any, c0: Any, *weights: Any) -> None:
        stack.backward(
            *(threads, batch_sizes, reset, x, h0, c0, list(weights), y, saved, *given, *written)
        )

    try:
        run(y, *inputs)
    except ValueError:  # a hook on saved tensors may have returned others, not contiguous
        run(*map(rows, (y, *inputs)))
    return found
