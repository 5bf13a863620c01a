"""The framework's products in the gradients of a layer on a CUDA device."""

from __future__ import annotations

import torch
from torch import Tensor

from .cell_table import Cell
from .sequences import step_and_row


def real(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Products:
    """What follows from the gradients of a direction's gates, ``[rows, gates * H]``."""

    def __init__(self, cell: Cell, hidden: int, dgates: Tensor) -> None:
        self._cell, self._hidden, self._dgates = cell, hidden, dgates

    def _of(self, window: tuple[int, int]) -> tuple[Tensor, tuple[int, ...]]:
        """The gradients of a window of gates, and the blocks of the weights that belong to them."""
        begin, end = window
        part = self._dgates[:, begin * self._hidden : end * self._hidden]
        return part, self._cell.weight_block[begin:end]

    def _are_all(self, order: tuple[int, ...], weight: Tensor) -> bool:
        """Whether these are the blocks of a weight, in its order."""
        return order == tuple(range(weight.size(0) // self._hidden))

    def _in_blocks(self, like: Tensor, parts: list[tuple[Tensor, tuple[int, ...]]]) -> Tensor:
        """A tensor like a weight or a bias, from parts with those blocks of it."""
        if len(parts) == 1 and self._are_all(parts[0][1], like):
            return parts[0][0]
        whole = torch.empty_like(like, memory_format=torch.contiguous_format)
        for rows, order in parts:
            for i, block in enumerate(order):
                of = slice(block * self._hidden, (block + 1) * self._hidden)
                whole[of] = rows[i * self._hidden : (i + 1) * self._hidden]
        return whole

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
            # What the second product of gru_original multiplies is r h.
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
    """The h that every step saw: ``[rows, H]``, from ``y [T, B, H]`` or packed, and ``h0 [B, H]``."""
    if h0 is None:
        batch = y.size(1) if batch_sizes is None else int(batch_sizes[0])
        h0 = y.new_zeros(batch, y.size(-1))
    if batch_sizes is None:
        others = y[1:] if reverse else y[:-1]
        found = torch.cat([others, h0[None]] if reverse else [h0[None], others])
    else:
        found = torch.cat([y, h0])[_index_before(batch_sizes, y.size(0), reverse).to(y.device)]
    if reset is not None:
        found = found.masked_fill(reset[..., None], 0)
    return found.flatten(0, -2)


def _index_before(batch_sizes: Tensor, rows: int, reverse: bool) -> Tensor:
    """For each packed row, that of the step before; past the last one, the row's initial state."""
    first = batch_sizes.cumsum(0) - batch_sizes
    step, b = step_and_row(batch_sizes, rows)
    other = step + 1 if reverse else step - 1
    there = (other >= 0) & (other < len(batch_sizes))
    other = other.clamp(0, len(batch_sizes) - 1)
    there &= b < batch_sizes[other]
    return torch.where(there, first[other] + b, rows + b)
