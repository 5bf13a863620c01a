"""What there is to know about each cell, read from the extension; csrc/cells has the cells."""

from __future__ import annotations

from typing import NamedTuple

from .._native import _C

__all__ = ["CELLS", "Cell", "Onnx"]


class Onnx(NamedTuple):
    """The operator of ONNX that computes a cell."""

    op: str
    order: tuple[int, ...]  # torch's gate block for each block of the operator; ~k: block k negated
    activation: str | None  # the attributes that choose the cell; None where the operator has none such
    linear_before_reset: int | None


class Cell(NamedTuple):
    """A cell of the extension's table."""

    number: int
    name: str
    gates: int  # those of a step; csrc/cells/cells.h explains them, their blocks and their ranges
    weight_blocks: int  # G: a weight has G * H rows
    weight_block: tuple[int, ...]  # the block of each gate
    input: tuple[int, int]  # the first gate that W_ih feeds, and the one after the last
    recurrent: tuple[tuple[int, int], ...]  # likewise for W_hh, in each stage
    stages: int  # dependent products with the recurrent weights in a step
    has_c: bool  # whether it carries a cell state beside h
    projects: bool  # whether h may be a projection
    onnx: Onnx


#: The cells by name.
CELLS: dict[str, Cell] = {
    fields["name"]: Cell(**{**fields, "onnx": Onnx(**fields["onnx"])}) for fields in _C.cells()
}
