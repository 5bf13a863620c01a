"""The least time that a case can take on this machine, from rates that are measured here.

Three things limit a case: the products of matrices, at the peak of the unit that multiplies; the
formula of the cell for every unit, with numbers in the first-level cache; and the reading of the
weights, which every step needs again, from the cache that holds them. They may overlap, so the floor
is the largest of the three and not their sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rnnfast._native import _C
from rnnfast.cli.bench.measure import TRAIN, Case
from rnnfast.stack import precision
from rnnfast.stack.cell_table import CELLS

FORMULAS = {"RNN": "rnn_tanh", "LSTM": "lstm", "GRU": "gru"}
ITEM_BYTES = {"float32": 4, "float64": 8, "bfloat16": 2}
LINE = 64  # bytes of a line of the caches
MOST_OF_PRODUCTS = 2**20  # the largest B and H whose products csrc/python/rates.cpp measures
REPEATS, SECONDS = 5, 0.02  # of each measurement


class Rates:
    """What this machine does in a second, with a number of threads.

    A rate is the largest of several measurements, since other processes only lower a measurement.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._measured: dict[tuple[str, tuple[Any, ...]], float] = {}

    def peak(self, unit: str) -> float:
        """Operations of multiply-adds, of the vectors of a dtype or of the matrix unit."""
        return self._rate("peak_flops", unit)

    def products(self, case: Case) -> float:
        """Operations of the recurrent products of a step, without the cell's formula."""
        number, setting = CELLS[FORMULAS[case.cell]].number, precision.float32_setting()
        return self._rate("product_rate", number, case.dtype, setting, case.B, case.H)

    def formula(self, cell: str, dtype: str, backward: bool) -> float:
        """Units whose formula is computed, each for one row and one step."""
        return self._rate("formula_rate", CELLS[FORMULAS[cell]].number, dtype, backward)

    def reading(self, size: float) -> float:
        """Bytes that the threads read of ``size`` bytes, each thread its own part again and again."""
        part = max(LINE, int(size) // self.threads // LINE * LINE)
        self._rate("read_rate", part)
        # A cache that holds a larger part would hold this one too.
        rates = self._measured.items()
        return max(rate for (kind, what), rate in rates if kind == "read_rate" and what[0] >= part)

    @property
    def peaks(self) -> dict[str, float]:
        """The peaks that were measured, by the names of the units."""
        return {what[0]: rate for (kind, what), rate in self._measured.items() if kind == "peak_flops"}

    def measure_again(self) -> None:
        for key in self._measured:
            self._measured[key] = max(self._measured[key], self._measure(*key))

    def record(self) -> dict[str, Any]:
        """All rates, for JSON."""
        names = [cell.name for cell in CELLS.values()]
        products, formulas, reading = [], [], []
        for (kind, what), rate in self._measured.items():
            if kind == "product_rate":
                cell, dtype, _, batch, hidden = what
                sizes = {"B": batch, "H": hidden, "flops": rate}
                products.append({"cell": names[cell], "dtype": dtype, **sizes})
            elif kind == "formula_rate":
                cell, dtype, backward = what
                passes = "backward" if backward else "forward"
                formulas.append({"cell": names[cell], "dtype": dtype, "pass": passes, "units": rate})
            elif kind == "read_rate":
                reading.append({"bytes_of_a_thread": what[0], "bytes": rate})
        return {
            "peak_flops": self.peaks,
            "product_rates": products,
            "formula_rates": formulas,
            "read_rates": reading,
        }

    def _rate(self, kind: str, *what: Any) -> float:
        key = kind, what
        if key not in self._measured:
            self._measured[key] = self._measure(*key)
        return self._measured[key]

    def _measure(self, kind: str, what: tuple[Any, ...]) -> float:
        measure: Callable[..., float] = getattr(_C, kind)
        return max(measure(*what, self.threads, SECONDS) for _ in range(REPEATS))


@dataclass(frozen=True)
class Floor:
    """The seconds that each part of a case would take alone."""

    products: float
    gates: float
    weights: float

    @property
    def name(self) -> str:
        """The part that takes longest."""
        parts: dict[str, float] = asdict(self)
        return max(parts, key=lambda part: parts[part])

    @property
    def seconds(self) -> float:
        return max(self.products, self.gates, self.weights)


def rates_for(cases: Sequence[Case], threads: int) -> Rates:
    """The rates that the floors of the cases need, and the peak of every unit of the processor.

    The peak of float64 is only measured for cases of that dtype.
    """
    rates = Rates(threads)
    for name in _C.units():
        if name != "float64":
            rates.peak(name)
    for case in cases:
        floor(case, rates)
        if has_products(case):
            rates.products(case)
    return rates


def unit(case: Case) -> tuple[str, int, int]:
    """The unit that multiplies, its products for each of the case, and the bytes of a packed weight."""
    return _C.product_unit(case.dtype, precision.float32_setting(), case.H)


def has_products(case: Case) -> bool:
    """Whether the recurrent products of the case can be measured alone."""
    return max(case.B, case.H) <= MOST_OF_PRODUCTS


def share_of_peak(case: Case, rates: Rates) -> float:
    """The speed of a step's products alone, divided by the peak of the unit that multiplies."""
    name, products, _ = unit(case)
    return rates.products(case) * products / rates.peak(name)


def floor(case: Case, rates: Rates) -> Floor:
    name, products, _ = unit(case)
    return Floor(case.flops * products / rates.peak(name), _gates(case, rates), _weights(case, rates))


def _gates(case: Case, rates: Rates) -> float:
    units = float(case.lengths().sum()) * case.H * case.layers * case.directions
    passes = (False, True) if case.mode == TRAIN else (False,)
    return sum(units / rates.formula(case.cell, case.dtype, backward) for backward in passes)


def _weights(case: Case, rates: Rates) -> float:
    """Each pass reads all weights once, and those of the states again at every step but one."""
    _, _, packed = unit(case)
    unpacked = min(packed, ITEM_BYTES[case.dtype])  # of what is read once
    steps = int(case.lengths().max())
    training = case.mode == TRAIN
    once, again = 0.0, 0.0  # bytes, seconds
    size = float(sum(inputs + states for inputs, states in case.weights) * case.directions * unpacked)
    for layer, (inputs, states) in enumerate(case.weights):
        once += inputs + states
        if training and (layer > 0 or case.dx):
            once += inputs
        recurrent = states * packed
        passes = 2 if training else 1
        again += passes * (steps - 1) * recurrent / rates.reading(recurrent)
    return case.directions * (once * unpacked / rates.reading(size) + again)
