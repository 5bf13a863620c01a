"""The measured table that the mode "auto" reads: which layers are faster on the CUDA kernels."""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from pathlib import Path
from typing import NamedTuple

#: The ratio from which a case counts as a win: times of the same case differ by a few percent from one
#: run to the next.
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
    steps: int
    ratio: float  # the lower quartile of torch.nn's times over the upper one of ours


#: For a kind and each measured (hidden, batch) the ratio of each measured number of steps.
Grids = dict[Kind, dict[tuple[int, int], dict[int, float]]]


def grids_of(cases: list[list[object]]) -> Grids:
    """The grids of cases as :func:`row_of` writes them."""
    grids: Grids = {}
    for *kind, hidden, batch, steps, ratio in cases:
        grid = grids.setdefault(Kind(*kind), {})  # type: ignore[arg-type]
        corner = grid.setdefault((int(hidden), int(batch)), {})  # type: ignore[call-overload]
        corner[int(steps)] = float(ratio)  # type: ignore[call-overload,arg-type]
    return grids


def key_of(capability: str, multiprocessors: int) -> str:
    """The name of a device in the table. A part of a GPU has fewer multiprocessors than the whole."""
    return f"{capability} with {multiprocessors} multiprocessors"


def row_of(case: Case) -> list[object]:
    """A case as a row of the table's file."""
    return [*case.kind, case.hidden, case.batch, case.steps, round(case.ratio, 3)]


def read(file: Path) -> dict[str, Grids]:
    """For each :func:`key_of` the grids that were measured on such a device."""
    table = json.loads(file.read_text(encoding="utf-8"))
    return {key: grids_of(entry["cases"]) for key, entry in table.items()}


FILE = Path(__file__).with_name("cuda_measured.json")
#: The table. No device was measured yet, so it is empty.
TABLE = read(FILE)


def wins(device: str, kind: Kind, sizes: tuple[int, int], steps: int) -> bool:
    """Whether the measured cases around a layer of (H, B) = ``sizes`` all win.

    These are the cases with the next smaller and the next larger hidden size and batch, or the same. A
    layer beyond the measured sizes does not win, nor one of a kind that was not measured. Of each size
    counts the longest measured sequence that has at most ``steps`` steps. Without one it does not win.
    """
    hidden, batch = sizes
    grid = TABLE.get(device, {}).get(kind)
    if not grid:
        return False
    corners = [
        (h, b)
        for h in _around(sorted({h for h, _ in grid}), hidden)
        for b in _around(sorted({b for _, b in grid}), batch)
    ]
    return bool(corners) and all(
        _ratio(grid.get(corner, {}), steps) >= LEAST_RATIO for corner in corners
    )


def _ratio(measured: dict[int, float], steps: int) -> float:
    """The ratio of the longest sequence that has at most ``steps`` steps; 0 if there is none."""
    there = [t for t in measured if t <= steps]
    return measured[max(there)] if there else 0.0


def may_win(device: str, kind: Kind) -> bool:
    """Whether a measured case of this kind wins, of whatever size."""
    return any(ratio >= LEAST_RATIO for ratio in _ratios(TABLE.get(device, {}).get(kind, {})))


def counts(device: str) -> tuple[int, int]:
    """How many measured cases of such a device win, and how many there are."""
    ratios = [ratio for grid in TABLE.get(device, {}).values() for ratio in _ratios(grid)]
    return sum(ratio >= LEAST_RATIO for ratio in ratios), len(ratios)


def _ratios(grid: dict[tuple[int, int], dict[int, float]]) -> list[float]:
    return [ratio for measured in grid.values() for ratio in measured.values()]


def _around(values: list[int], value: int) -> tuple[int, ...]:
    """The neighbours of ``value`` in sorted ``values``; empty if ``value`` lies outside."""
    below, above = bisect_right(values, value) - 1, bisect_left(values, value)
    return () if below < 0 or above == len(values) else (values[below], values[above])
