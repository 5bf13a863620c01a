"""The measured table that the mode "auto" reads: which layers are faster on the CUDA kernels."""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from pathlib import Path
from typing import NamedTuple

#: torch.nn's time over ours from which a case counts as a win. Medians of the same case differ by a few
#: percent from one run to the next.
LEAST_RATIO = 1.05


class Kind(NamedTuple):
    """What the cases of one grid of measurements have in common."""

    cell: str
    dtype: str  # as torch names it, and "tf32" for float32 with products in TF32
    training: bool  # forward and backward; False: forward without gradients
    layers: int
    directions: int
    packed: bool


class Case(NamedTuple):
    """One measured case."""

    kind: Kind
    hidden: int
    batch: int
    ratio: float  # torch.nn's time over ours


#: For a kind the ratio of each measured (hidden, batch).
Grids = dict[Kind, dict[tuple[int, int], float]]


def grids_of(cases: list[list[object]]) -> Grids:
    """The grids of cases as :func:`row_of` writes them."""
    grids: Grids = {}
    for *kind, hidden, batch, ratio in cases:
        grid = grids.setdefault(Kind(*kind), {})  # type: ignore[arg-type]
        grid[int(hidden), int(batch)] = float(ratio)  # type: ignore[call-overload,arg-type]
    return grids


def row_of(case: Case) -> list[object]:
    """A case as a row of the table's file."""
    return [*case.kind, case.hidden, case.batch, round(case.ratio, 3)]


def read(file: Path) -> dict[str, Grids]:
    """For each compute capability, such as "9.0", the grids that were measured on such a device."""
    table = json.loads(file.read_text(encoding="utf-8"))
    return {capability: grids_of(entry["cases"]) for capability, entry in table.items()}


FILE = Path(__file__).with_name("cuda_measured.json")
#: The table. No device was measured yet, so it is empty.
TABLE = read(FILE)


def wins(capability: str, kind: Kind, hidden: int, batch: int) -> bool:
    """Whether the measured cases around a layer all win.

    These are the cases with the next smaller and the next larger hidden size and batch, or the same. A
    layer beyond the measured sizes does not win, nor one of a kind that was not measured.
    """
    grid = TABLE.get(capability, {}).get(kind)
    if not grid:
        return False
    corners = [
        (h, b)
        for h in _around(sorted({h for h, _ in grid}), hidden)
        for b in _around(sorted({b for _, b in grid}), batch)
    ]
    return bool(corners) and all(grid.get(corner, 0) >= LEAST_RATIO for corner in corners)


def may_win(capability: str, kind: Kind) -> bool:
    """Whether a measured case of this kind wins, of whatever size."""
    grid = TABLE.get(capability, {}).get(kind, {})
    return any(ratio >= LEAST_RATIO for ratio in grid.values())


def counts(capability: str) -> tuple[int, int]:
    """How many measured cases of an architecture win, and how many there are."""
    ratios = [ratio for grid in TABLE.get(capability, {}).values() for ratio in grid.values()]
    return sum(ratio >= LEAST_RATIO for ratio in ratios), len(ratios)


def _around(values: list[int], value: int) -> tuple[int, ...]:
    """The neighbours of ``value`` in sorted ``values``; empty if ``value`` lies outside."""
    below, above = bisect_right(values, value) - 1, bisect_left(values, value)
    return () if below < 0 or above == len(values) else (values[below], values[above])
