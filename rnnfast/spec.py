"""What a stack of layers is, and what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor

from .cell_table import CELLS

__all__ = ["CELLS", "Outputs", "Spec", "spec"]


class Spec(NamedTuple):
    """What a stack of layers is, beside its tensors; csrc/stack.h has their shapes."""

    cell: str
    layers: int
    directions: int
    bias: bool
    projected: bool
    batch_first: bool

    @property
    def has_c(self) -> bool:
        """Whether the stack carries a cell state. No cell has the name where torch has to refuse it."""
        return self.cell in CELLS and CELLS[self.cell].has_c

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
