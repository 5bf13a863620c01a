"""The products that torch computes for the gradients of a layer on a CUDA device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from .cell_table import Cell


def real(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and states in a layer of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Products:
    """Gradients of one direction, from the gradients of its gates ``dgates [rows, gates * H]``.

    W_ih and W_hh could have one product with ``[x, h]``. It would need three copies more: of x, and of
    the two parts of the result. It would read dgates fewer times only if I or H is smaller than a tile
    of the product, about 128.
    """

    def __init__(self, cell: Cell, hidden: int, dgates: Tensor) -> None:
        self._cell, self._hidden, self._dgates = cell, hidden, dgates

    def _of(self, window: tuple[int, int]) -> tuple[Tensor, tuple[int, ...]]:
        """The columns of ``dgates`` for a window of gates, and the weight blocks of these gates."""
        begin, end = window
        part = self._dgates[:, begin * self._hidden : end * self._hidden]
        return part, self._cell.weight_block[begin:end]

    def _are_all(self, order: tuple[int, ...], weight: Tensor) -> bool:
        """Whether ``order`` lists all blocks of a weight in their order."""
        return order == tuple(range(weight.size(0) // self._hidden))

    def _in_blocks(self, like: Tensor, parts: list[tuple[Tensor, tuple[int, ...]]]) -> Tensor:
        """A gradient with the shape of ``like``, from parts and the blocks that each part contains."""
        if len(parts) == 1 and self._are_all(parts[0][1], like):
            return parts[0][0]
        gradient = torch.empty_like(like, memory_format=torch.contiguous_format)
        for rows, order in parts:
            for i, block in enumerate(order):
                start = block * self._hidden
                gradient[start : start + self._hidden] = rows[i * self._hidden : (i + 1) * self._hidden]
        return gradient

    def of_input(self, w_ih: Tensor) -> Tensor:
        part, order = self._of(self._cell.input)
        if self._are_all(order, w_ih):
            return part @ w_ih
        blocks = w_ih.split(self._hidden)  # type: ignore[no-untyped-call]
        return part @ torch.cat([blocks[b] for b in order])

    def of_w_ih(self, w_ih: Tensor, x: Tensor) -> Tensor:
        part, order = self._of(self._cell.input)
        return self._in_blocks(w_ih, [(part.t() @ x, order)])

    def of_w_hh(self, w_hh: Tensor, before: Tensor, r: Tensor) -> Tensor:
        parts = []
        for stage, window in enumerate(self._cell.recurrent):
            part, order = self._of(window)
            # The second product of the original GRU is W_hn (r h); r is the first gate.
            operand = before if stage == 0 else before * r
            parts.append((part.t() @ operand.flatten(0, -2), order))
        return self._in_blocks(w_hh, parts)

    @cached_property
    def _sums(self) -> Tensor:
        """The sums of all gates, which the gradients of both biases read."""
        return self._dgates.sum(0, dtype=real(self._dgates.dtype)).to(self._dgates.dtype)

    def _of_bias(self, bias: Tensor, windows: Sequence[tuple[int, int]]) -> Tensor:
        h, order = self._hidden, self._cell.weight_block
        parts = [(self._sums[begin * h : end * h], order[begin:end]) for begin, end in windows]
        gradient = self._in_blocks(bias, parts)
        # The two gradients must not share memory.
        return gradient.clone() if gradient is parts[0][0] else gradient

    def of_b_ih(self, b_ih: Tensor) -> Tensor:
        return self._of_bias(b_ih, [self._cell.input])

    def of_b_hh(self, b_hh: Tensor) -> Tensor:
        return self._of_bias(b_hh, self._cell.recurrent)


def before(y: Tensor, h0: Tensor | None, source: Tensor | None, reverse: bool, time: int) -> Tensor:
    """The h before each step, from ``y`` and ``h0 [B, H]``, in the layout of ``y``.

    ``time`` is the dimension of time, 0 or 1. A packed ``y`` comes with ``source``, from
    :func:`row_before`.
    """
    if source is not None:
        if h0 is None:
            return F.pad(y, (0, 0, 0, 1))[source.clamp(max=y.size(0))]
        return torch.cat([y, h0])[source]
    first = y.new_zeros(()).expand_as(y.select(time, 0)) if h0 is None else h0
    kept = y.narrow(time, 1 if reverse else 0, y.size(time) - 1)
    initial = first.unsqueeze(time)
    return torch.cat([kept, initial] if reverse else [initial, kept], time)


def row_before(first: Tensor, rows: int, reverse: bool) -> Tensor:
    """For each packed row the index of the row one step before; ``rows + b`` for b's initial state.

    ``first [T + 1]`` has the number of rows before each step, and of all steps. All is computed on its
    device.
    """
    row = torch.arange(rows, device=first.device)
    step = torch.searchsorted(first, row, right=True) - 1
    b = row - first[step]
    source = step + 1 if reverse else step - 1
    has_source = (source >= 0) & (source < first.size(0) - 1)
    source = source.clamp(0, first.size(0) - 2)
    has_source &= b < first[source + 1] - first[source]
    return torch.where(has_source, first[source] + b, rows + b)
