"""The table of cells, read from the extension; csrc/cells defines the cells."""

from __future__ import annotations

from typing import NamedTuple

from .._native import _C

__all__ = ["CELLS", "Cell", "Onnx"]


class Onnx(NamedTuple):
    """The operator of ONNX that computes a cell."""

    op: str
    order: tuple[int, ...]  # for each block of the operator torch's block k; ~k means minus block k
    activation: str | None  # attribute of RNN; None for other operators
    linear_before_reset: int | None  # attribute of GRU; None for other operators


class Cell(NamedTuple):
    """A cell of the extension's table."""

    number: int
    name: str
    gates: int  # number of gates; csrc/cells/cells.h explains gates, blocks and windows
    weight_blocks: int  # G: a weight has G * H rows
    weight_block: tuple[int, ...]  # for each gate its block of rows in the weights
    block_names: str  # a letter for each block: of an LSTM "ifgo"
    input: tuple[int, int]  # the gates that W_ih feeds: the first, and one past the last
    recurrent: tuple[tuple[int, int], ...]  # for each stage the gates that W_hh feeds
    stages: int  # number of dependent products with recurrent weights in a step
    has_c: bool  # whether the cell has a cell state c beside h
    projects: bool  # whether h may be a projection
    onnx: Onnx


#: The cells, by name.
CELLS: dict[str, Cell] = {
    fields["name"]: Cell(**{**fields, "onnx": Onnx(**fields["onnx"])}) for fields in _C.cells()
}
