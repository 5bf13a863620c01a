"""A stack of layers on torch tensors, as the kernels compute it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks
from ._native import _C

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


@cache
def _stack(
    cell: str, layers: int, directions: int, bias: bool, projected: bool, batch_first: bool
) -> Any:
    return _C.Stack(CELLS[cell], layers, directions, False, False, bias, projected, batch_first)


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
    memory = _stack(*spec).new_saved(checks.DTYPES[dtype], 1, hidden, outputs)
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
        stack = _stack(*spec)
    except KeyError:  # no such cell
        return None
    given = (checks.PLAIN_TYPES, torch.get_num_threads(), batch_sizes, reset, x, h0, c0, weights)
    try:
        found = stack.call(*given, cells, _as_tensor if save else None, packed)
    except ValueError as error:  # weights of another shape: torch raises RuntimeError
        raise RuntimeError(str(error)) from None
    return None if found is None else tuple.__new__(Outputs, found)


def why_not(
    spec: Spec,
    batch_sizes: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Any],
    reset: Tensor | None,
) -> str:
    """What is wrong with the arguments for which :func:`forward` returned None."""
    given = (torch.get_num_threads(), batch_sizes, reset, x, h0, c0, weights)
    try:
        # One output, and of no size, so that it computes nothing if they are right.
        _stack(*spec).forward(*given, x.new_empty(0), None, None, None, None)
    except Exception as error:
        return str(error)
    raise AssertionError("it took an output of no size")


def pack(spec: Spec, weights: list[Any]) -> Any:
    """The weights packed for :func:`forward`, or None where they are not what the kernels take."""
    w_ih = weights[0]
    try:
        return _stack(*spec).pack(w_ih.new_zeros(1, 1, w_ih.size(-1)), weights)
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
    stack, threads = _stack(*spec), torch.get_num_threads()
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
