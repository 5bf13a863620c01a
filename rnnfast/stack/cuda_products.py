"""The products that torch computes for the gradients of a layer on a CUDA device."""

from __future__ import annotations

import torch
from torch import Tensor

from .cell_table import Cell
from .sequences import step_and_row


def real(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and states in a layer of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Products:
    """Gradients of one direction, from the gradients of its gates ``dgates [rows, gates * H]``."""

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

    def of_w_hh(self, w_hh: Tensor, before: Tensor, gates: Tensor) -> Tensor:
        parts = []
        for stage, window in enumerate(self._cell.recurrent):
            part, order = self._of(window)
            # The second product of gru_original is W_hn (r h); r is the first gate.
            operand = before if stage == 0 else before * gates.flatten(0, -2)[:, : self._hidden]
            parts.append((part.t() @ operand, order))
        return self._in_blocks(w_hh, parts)

    def _sum(self, window: tuple[int, int]) -> tuple[Tensor, tuple[int, ...]]:
        part, order = self._of(window)
        return part.sum(0, dtype=real(part.dtype)).to(part.dtype), order

    def of_b_ih(self, b_ih: Tensor) -> Tensor:
        return self._in_blocks(b_ih, [self._sum(self._cell.input)])

    def of_b_hh(self, b_hh: Tensor) -> Tensor:
        return self._in_blocks(b_hh, [self._sum(window) for window in self._cell.recurrent])


def before(
    y: Tensor, h0: Tensor | None, reverse: bool, batch_sizes: Tensor | None, reset: Tensor | None
) -> Tensor:
    """The h before each step, ``[rows, H]``, from ``y`` (``[T, B, H]`` or packed) and ``h0 [B, H]``."""
    if h0 is None:
        batch = y.size(1) if batch_sizes is None else int(batch_sizes[0])
        h0 = y.new_zeros(batch, y.size(-1))
    if batch_sizes is None:
        h = torch.cat([y[1:], h0[None]] if reverse else [h0[None], y[:-1]])
    else:
        h = torch.cat([y, h0])[_index_before(batch_sizes, y.size(0), reverse).to(y.device)]
    if reset is not None:
        h = h.masked_fill(reset[..., None], 0)
    return h.flatten(0, -2)


def _index_before(batch_sizes: Tensor, rows: int, reverse: bool) -> Tensor:
    """For each packed row the index of the row one step before; ``rows + b`` for b's initial state."""
    first = batch_sizes.cumsum(0) - batch_sizes
    step, b = step_and_row(batch_sizes, rows)
    source = step + 1 if reverse else step - 1
    has_source = (source >= 0) & (source < len(batch_sizes))
    source = source.clamp(0, len(batch_sizes) - 1)
    has_source &= b < batch_sizes[source]
    return torch.where(has_source, first[source] + b, rows + b)
