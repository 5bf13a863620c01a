"""One direction of one layer on torch tensors: allocates what the kernels write, and calls them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks
from ._native import _C

#: A cell's number in the extension's table, by name.
CELLS: dict[str, int] = {name: number for number, name in enumerate(_C.cells())}
_LSTM = CELLS["lstm"]


class Inputs(NamedTuple):
    """What one direction of one layer reads; what its backward writes gradients of."""

    x: Tensor | None  # [T, B, I]
    h0: Tensor | None  # [B, R]; None means zeros; R is H unless h is projected
    c0: Tensor | None  # [B, H]
    w_ih: Tensor | None  # [G * H, I]
    w_hh: Tensor | None  # [G * H, R]
    b_ih: Tensor | None  # [G * H]; None means zeros
    b_hh: Tensor | None
    w_hr: Tensor | None  # [R, H]; None means no projection


class Outputs(NamedTuple):
    """What it writes. In a gradient None means zeros."""

    y: Tensor | None  # [T, B, R]
    h_n: Tensor | None  # [B, R]
    c_n: Tensor | None  # [B, H]


def rows(t: Tensor | None) -> Tensor | None:
    """A tensor that the kernels can read: its last dimension contiguous. Copies only if it must."""
    if t is None:
        return None
    if checks.lazy(t):
        t = t.resolve_neg() if t.is_neg() else torch.zeros(t.shape, dtype=t.dtype)
    return t if t.size(-1) <= 1 or t.stride(-1) == 1 else t.contiguous()


def new_saved(cell: int, x: Tensor, hidden: int) -> Tensor:
    """Uninitialised memory for what backward needs of one direction."""
    count = x.size(0) if x.dim() == 2 else x.size(0) * x.size(1)
    try:
        memory = _C.new_saved(cell, x.dtype == torch.float64, count, hidden)
    except MemoryError:  # torch raises RuntimeError, and programs that try a smaller batch catch that
        raise RuntimeError(
            f"can't allocate memory: what backward needs of {count} rows of {hidden} hidden units"
        ) from None
    return torch.frombuffer(memory, dtype=x.dtype) if count else x.new_empty(0)


def forward(
    cell: int,
    reverse: bool,
    batch_sizes: Tensor | None,
    inputs: Inputs,
    outputs: Outputs,
    saved: Tensor | None,
) -> None:
    """Run one direction of one layer; ``outputs`` and ``saved`` are written.

    With ``batch_sizes`` sequences are packed: ``[sum of batch_sizes, features]``.
    """
    threads = torch.get_num_threads()
    read = tuple(map(rows, inputs))
    try:
        _C.forward(cell, reverse, threads, batch_sizes, read, (*outputs, saved))
    except ValueError as error:  # weights of another shape: torch raises RuntimeError
        raise RuntimeError(str(error)) from None


def backward(
    cell: int,
    reverse: bool,
    batch_sizes: Tensor | None,
    inputs: Inputs,
    y: Tensor,
    saved: Tensor,
    grad_outputs: Outputs,
    grad_inputs: Inputs,
    accumulate_dx: bool,
) -> None:
    """Write the gradients in ``grad_inputs`` that are not None; ``x``'s is added to on request."""
    _C.backward(
        cell,
        reverse,
        torch.get_num_threads(),
        batch_sizes,
        tuple(map(rows, inputs)),
        y,
        saved,
        tuple(map(rows, grad_outputs)),
        grad_inputs,
        accumulate_dx,
    )


def infer(
    cell: int,
    layers: int,
    directions: int,
    bias: bool,
    projected: bool,
    batch_first: bool,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Any],
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """A whole stack ``[T, B, I]``, or one step of one layer ``[B, I]``, without gradients, in one call.

    Returns ``y``, ``h_n`` (``y`` itself for a step) and ``c_n``; None, having done nothing, where an
    argument is not what the kernels take. ``weights`` is flat, in torch's order.
    """
    # Written out: at this size of call a loop over a helper costs as much as the kernel.
    if x.is_neg() or x._is_zerotensor():
        return None
    for state in (h0, c0):
        if state is not None and (
            type(state) not in checks.PLAIN_TYPES or state.is_neg() or state._is_zerotensor()
        ):
            return None
    for weight in weights:
        if weight.is_neg():
            return None
    outputs = weights[1].shape[-1]
    hidden = weights[4 if bias else 2].shape[-1] if projected else outputs
    shape = x.shape
    if len(shape) == 2:
        y = x.new_empty((shape[0], outputs))
        h_n, c_n = None, torch.empty_like(y) if cell == _LSTM else None
    else:
        y = x.new_empty((shape[0], shape[1], directions * outputs))
        number, batch = layers * directions, shape[0 if batch_first else 1]
        h_n = x.new_empty((number, batch, outputs))
        c_n = x.new_empty((number, batch, hidden)) if cell == _LSTM else None
    threads = torch.get_num_threads()
    if not _C.infer(
        *(checks.PLAIN_TYPES, cell, layers, directions, bias, projected, batch_first, threads),
        *(x, h0, c0, weights, y, h_n, c_n),
    ):
        return None
    return y, y if h_n is None else h_n, c_n
