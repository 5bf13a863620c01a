"""A stack of layers on torch tensors: allocates what the kernels write, and calls them."""

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


class Outputs(NamedTuple):
    """What a stack returns."""

    y: Tensor
    h_n: Tensor | None  # None for a step, whose y it is
    c_n: Tensor | None
    cells: Tensor | None = None  # where they were asked for


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
        t = t.resolve_neg() if t.is_neg() else torch.zeros(t.shape, dtype=t.dtype)
    return t if t.size(-1) <= 1 or t.stride(-1) == 1 else t.contiguous()


def new_saved(spec: Spec, x: Tensor, count: int, hidden: int, outputs: int) -> Tensor:
    """Uninitialised memory for what backward needs of ``count`` rows of ``x``."""
    try:
        memory = _stack(*spec).new_saved(checks.DTYPES[x.dtype], count, hidden, outputs)
    except MemoryError:  # torch raises RuntimeError, and programs that try a smaller batch catch that
        raise RuntimeError(
            f"can't allocate memory: what backward needs of {count} rows of {hidden} hidden units"
        ) from None
    return torch.frombuffer(memory, dtype=torch.uint8) if count else x.new_empty(0, dtype=torch.uint8)


def saved_bytes_of_a_row(spec: Spec, dtype: torch.dtype, hidden: int, outputs: int) -> int:
    """The size of :func:`new_saved` for each row."""
    memory = _stack(*spec).new_saved(checks.DTYPES[dtype], 1, hidden, outputs)
    return memoryview(memory).nbytes


def forward(
    spec: Spec,
    batch_sizes: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Any],
    *,
    save: bool,
    packed: Any = None,
    reset: Tensor | None = None,
    cells: bool = False,
) -> tuple[Outputs, Tensor | None] | None:
    """Run a stack; None, having done nothing, where an argument is not what the kernels take.

    ``x`` is ``[T, B, I]``, ``[B, T, I]`` where ``spec.batch_first``, packed with ``batch_sizes``, or
    ``[B, I]`` for one step of one layer, whose states are ``[B, H]``. The second result is what
    backward needs, where ``save`` asks for it. ``packed`` is None or from :func:`pack`, with the same
    weights. Where ``reset``, bools for the rows of ``x``, is true, a row's states are zero before that
    step. ``cells`` asks for the last layer's c after every step, ``[T, B, D * H]`` or as ``y`` is.
    """
    # Written out: at the size of a small call a loop over a helper costs as much as the kernel, and
    # new_empty takes half as long with plain numbers as with a tuple.
    cell, layers, directions, bias, projected, batch_first = spec
    if cell not in CELLS or x.dtype not in checks.DTYPES or x.is_neg() or x._is_zerotensor():
        return None
    for state in (h0, c0):
        if state is not None and (state.is_neg() or state._is_zerotensor()):
            return None
    for weight in weights:
        if weight is None or weight.is_neg():
            return None
    w_hh = w_last = weights[1]
    if projected:
        w_last = weights[4 if bias else 2]
    for w in (w_hh, w_last):
        if w.dim() != 2 or w.shape[1] == 0:
            raise RuntimeError(
                f"a recurrent weight has shape {tuple(w.shape)}; expected two dimensions"
            )
    outputs, hidden = w_hh.shape[1], w_last.shape[1]
    shape, is_lstm = x.shape, cell == "lstm"
    h_n: Tensor | None = None
    if len(shape) == 2 and batch_sizes is None:
        count = batch = shape[0]
        y = x.new_empty(batch, outputs)
        c_n = x.new_empty(batch, hidden) if is_lstm else None
    else:
        if batch_sizes is None:
            count, batch = shape[0] * shape[1], shape[0 if batch_first else 1]
            y = x.new_empty(shape[0], shape[1], directions * outputs)
        else:
            count, batch = shape[0], int(batch_sizes[0])
            y = x.new_empty(count, directions * outputs)
        number = layers * directions
        h_n = x.new_empty(number, batch, outputs)
        c_n = x.new_empty(number, batch, hidden) if is_lstm else None
    saved = new_saved(spec, x, count, hidden, outputs) if save else None
    threads = torch.get_num_threads()
    c = y.new_empty(*y.shape[:-1], directions * hidden) if cells else None
    given = (checks.PLAIN_TYPES, threads, batch_sizes, reset, x, h0, c0, weights)
    try:
        if not _stack(*spec).forward(*given, y, h_n, c_n, c, saved, packed):
            return None
    except ValueError as error:  # weights of another shape: torch raises RuntimeError
        raise RuntimeError(str(error)) from None
    return Outputs(y, h_n, c_n, c), saved


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
