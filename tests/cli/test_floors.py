"""The floors of rnnfast bench: the rates that are measured, and the times that follow from them."""

from __future__ import annotations

import io
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from rnnfast import _C
from rnnfast.cli.bench import command, floors, measure, peers, table
from rnnfast.cli.bench.floors import Floor, Rates
from rnnfast.cli.bench.measure import FORWARD, TRAIN, Case, Result, Timing
from rnnfast.cli.bench.table import Row
from rnnfast.stack.cell_table import CELLS

TABLES = Path(__file__).parents[2] / "benchmarks" / "tables.py"

#: How far a floor may lie above a time: beside other processes the rates may have been measured in
#: worse moments than the time.
SLACK = 1.25

every_isa = pytest.mark.parametrize("isa", _C.supported_isas())


def best(rate, *arguments, threads=1):
    return max(rate(*arguments, threads, 0.01) for _ in range(4))


@every_isa
def test_every_unit_of_an_instruction_set_has_a_peak(isa):
    peaks = {unit: best(_C.peak_flops, unit) for unit in _C.units()}
    assert ("matrix" in peaks) == isa.startswith("amx")
    assert 0.4 < peaks["bfloat16"] / peaks["float32"] < 2.6
    if isa in _C.supported_isas("float64"):
        assert 1.5 < peaks["float32"] / peaks["float64"] < 2.6  # a vector has twice as many numbers
    if isa == "amx_emulated":  # whose products are multiply-adds of float32 vectors, and shifts
        assert 0.1 < peaks["matrix"] / peaks["float32"] < 1.1
    if isa == "amx":
        assert peaks["matrix"] > 2 * peaks["float32"]


@every_isa
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_of_a_step(isa, dtype):
    """Of many rows they are near the peak of the unit. One row waits for weights from memory."""
    _C.force_float32_parts(0)
    unit, _, _ = _C.product_unit(dtype, 0, 256)
    peak = best(_C.peak_flops, unit)
    for cell in CELLS.values():
        rate = 0.0
        for _ in range(20):  # a busy machine may slow all windows of one of the rates
            rate = max(rate, best(_C.product_rate, cell.number, dtype, 0, 32, 256))
            if 0.3 * peak < rate < 1.2 * peak:
                break
            peak = max(peak, best(_C.peak_flops, unit))
        assert 0.3 * peak < rate < 1.2 * peak
    lstm = CELLS["lstm"].number
    many, one = (best(_C.product_rate, lstm, dtype, 0, rows, 2048) for rows in (32, 1))
    assert one < 0.8 * many


def test_threads_share_the_products_of_a_step():
    lstm = CELLS["lstm"].number
    one, two = (best(_C.product_rate, lstm, "float32", 0, 32, 256, threads=n) for n in (1, 2))
    assert 0.9 * one < two < 2.4 * one
    # Of 3 units there is work for one thread.
    assert best(_C.product_rate, lstm, "float32", 0, 2, 3, threads=2) > 0


@every_isa
def test_a_formula_with_more_activations_takes_longer(isa):
    for dtype in ("float32", "float64", "bfloat16"):
        cells = [CELLS[name].number for name in ("rnn_relu", "rnn_tanh", "gru", "lstm")]  # 0, 1, 3, 5
        rates = [best(_C.formula_rate, cell, dtype, False) for cell in cells]
        assert all(more > fewer for more, fewer in itertools.pairwise(rates)), (dtype, rates)
        backward = [best(_C.formula_rate, cell, dtype, True) for cell in cells]
        assert backward[0] > backward[2] > backward[3]
        assert backward[3] > rates[3]  # one activation, that of the cell state


def test_large_buffers_are_read_more_slowly():
    first_cache, memory = (best(_C.read_rate, size) for size in (2**14, 2**27))
    assert first_cache > 1.5 * memory


def test_several_threads_do_not_do_less():
    one, two = (best(_C.peak_flops, "float32", threads=threads) for threads in (1, 2))
    assert 0.9 * one < two < 2.2 * one


@pytest.mark.parametrize(
    ("measured", "message"),
    [
        (lambda: _C.peak_flops("tensor", 1, 0.0), "dtype is 'tensor'"),
        (lambda: _C.peak_flops("float32", 0, 0.0), "threads is 0; expected >= 1"),
        (lambda: _C.peak_flops("float32", 1, -1.0), "seconds is -1.*; expected >= 0"),
        (lambda: _C.formula_rate(99, "float32", False, 1, 0.0), "cell 99 is not in the table"),
        (lambda: _C.product_rate(99, "float32", 0, 2, 8, 1, 0.0), "cell 99 is not in the table"),
        (lambda: _C.product_rate(0, "float32", 3, 2, 8, 1, 0.0), "precision is 3; expected 0"),
        (lambda: _C.product_rate(0, "float32", 0, 0, 8, 1, 0.0), "batch is 0 and hidden 8; expected 1"),
        (lambda: _C.product_rate(0, "float32", 0, 2, 2**40, 1, 0.0), "expected 1 to 1048576"),
        (lambda: _C.read_rate(100, 1, 0.0), "bytes is 100; expected a multiple of 64"),
        (lambda: _C.product_unit("float32", 3, 64), "precision is 3; expected 0"),
    ],
    ids=[
        *("unit", "threads", "seconds", "cell", "product cell", "product precision", "no rows"),
        *("many units", "bytes", "precision"),
    ],
)
def test_what_cannot_be_measured_is_an_error(measured, message):
    with pytest.raises(ValueError, match=message):
        measured()


def test_an_instruction_set_without_a_matrix_unit_says_so():
    _C.force_isa("baseline")
    with pytest.raises(ValueError, match="baseline has no matrix unit"):
        _C.peak_flops("matrix", 1, 0.0)


@every_isa
def test_the_unit_that_multiplies(isa):
    on_matrix = isa.startswith("amx")
    assert _C.product_unit("bfloat16", 0, 64) == ("matrix" if on_matrix else "bfloat16", 1, 2)
    assert _C.product_unit("float64", 0, 64) == ("float64", 1, 8)
    for parts, products in [(0, 1), (1, 1), (2, 3), (3, 6)]:
        _C.force_float32_parts(parts)
        expected = ("matrix", products, 2 * parts) if on_matrix and parts else ("float32", 1, 4)
        assert _C.product_unit("float32", 0, 64) == expected


def test_the_share_of_the_products_alone():
    """Six products on the matrix unit count six times."""
    case, rates = Case("LSTM", 10, 4, 8, 16, FORWARD), Fixed()
    assert floors.share_of_peak(case, rates) == pytest.approx(0.25)
    assert table.products_alone([case], rates).endswith("LSTM 25% (B=4 H=16) to 25%")
    if "amx_emulated" in _C.supported_isas():
        _C.force_isa("amx_emulated")
        _C.force_float32_parts(3)
        assert floors.share_of_peak(case, rates) == pytest.approx(6 * 0.25 / 4)


class Fixed(Rates):
    """Rates by which each part of a floor can be told."""

    def __init__(self):
        super().__init__(threads=1)
        self.sizes = []

    def peak(self, unit):
        return {"float32": 1e9, "bfloat16": 2e9, "matrix": 4e9}[unit]

    def products(self, case):
        return 0.25e9

    def formula(self, cell, dtype, backward):
        return 1e6 if backward else 2e6

    def reading(self, size):
        self.sizes.append(size)
        return 1e9


def test_floors_of_a_forward_pass():
    rates = Fixed()
    found = floors.floor(Case("LSTM", 10, 4, 8, 16, FORWARD), rates)
    assert found.products == pytest.approx(2 * 10 * 4 * 64 * (8 + 16) / 1e9)
    assert found.gates == pytest.approx(10 * 4 * 16 / 2e6)
    assert found.weights == pytest.approx(4 * (64 * 8 + 10 * 64 * 16) / 1e9)
    assert sorted(rates.sizes) == [4 * 64 * 16, 4 * 64 * (8 + 16)]
    assert found.name == "gates"
    assert found.seconds == found.gates


def test_floors_of_training():
    case = Case("GRU", 10, 4, 8, 16, TRAIN)
    found = floors.floor(case, Fixed())
    assert found.products == pytest.approx(3 * 2 * 10 * 4 * 48 * (8 + 16) / 1e9)
    assert found.gates == pytest.approx(10 * 4 * 16 * (1 / 1e6 + 1 / 2e6))
    assert found.weights == pytest.approx(4 * (2 * 48 * 8 + (10 + 9) * 48 * 16) / 1e9)
    on_data = floors.floor(case.on_data(), Fixed())
    assert on_data.weights == pytest.approx(4 * (48 * 8 + (10 + 9) * 48 * 16) / 1e9)
    assert on_data.gates == found.gates


def test_floors_of_a_stack():
    case = Case("LSTM", 5, 2, 8, 16, FORWARD, layers=2, bidirectional=True, proj=4)
    found = floors.floor(case, Fixed())
    states = 64 * 4 + 16 * 4
    assert found.gates == pytest.approx(5 * 2 * 16 * 4 / 2e6)
    assert found.weights == pytest.approx(4 * 2 * (64 * 8 + 64 * 8 + 2 * 5 * states) / 1e9)


def test_floors_of_packed_rows():
    case = Case("RNN", 30, 3, 8, 16, FORWARD, packed=True)
    found, steps = floors.floor(case, Fixed()), case.lengths()
    assert found.gates == pytest.approx(int(steps.sum()) * 16 / 2e6)
    assert found.weights == pytest.approx(4 * (16 * 8 + int(steps.max()) * 16 * 16) / 1e9)


@pytest.mark.skipif("amx_emulated" not in _C.supported_isas(), reason="was not built")
def test_floors_of_float32_in_three_parts():
    """Six products on the matrix unit. Weights are read once as float32, then as three bfloat16."""
    case = Case("LSTM", 10, 4, 8, 16, FORWARD)
    plain = floors.floor(case, Fixed())
    _C.force_isa("amx_emulated")
    _C.force_float32_parts(3)
    found = floors.floor(case, Fixed())
    assert found.products == pytest.approx(6 * plain.products / 4)
    assert found.gates == plain.gates
    assert found.weights == pytest.approx((4 * 64 * (8 + 16) + 6 * 9 * 64 * 16) / 1e9)


def test_rates_are_measured_once_and_never_sink(monkeypatch):
    values = iter([3.0, 5.0, 4.0, 2.0, 9.0, 1.0])
    monkeypatch.setattr(floors, "REPEATS", 2)
    monkeypatch.setattr(_C, "read_rate", lambda *_: next(values))
    rates = Rates(threads=2)
    assert rates.reading(1000) == 5.0
    assert rates.reading(1000) == 5.0
    assert rates.record()["read_rates"] == [{"bytes_of_a_thread": 448, "bytes": 5.0}]
    rates.measure_again()
    assert rates.reading(1000) == 5.0
    rates.measure_again()
    assert rates.reading(1000) == 9.0


def test_the_record_names_the_sizes_of_products(monkeypatch):
    monkeypatch.setattr(_C, "product_rate", lambda *_: 7.0)
    rates = Rates(threads=1)
    assert rates.products(Case("GRU", 10, 4, 8, 16, FORWARD, "bfloat16")) == 7.0
    row = {"cell": "gru", "dtype": "bfloat16", "B": 4, "H": 16, "flops": 7.0}
    assert rates.record()["product_rates"] == [row]


def test_a_part_is_read_at_least_as_fast_as_a_larger_one(monkeypatch):
    rates_by_size = {640: 4.0, 64000: 7.0, 64: 3.0}
    monkeypatch.setattr(_C, "read_rate", lambda size, *_: rates_by_size[size])
    rates = Rates(threads=1)
    assert [rates.reading(size) for size in (640, 64000, 64, 640)] == [4.0, 7.0, 7.0, 7.0]


CASES = [
    Case(cell, T, B, H, H, mode, dtype)
    for mode in (FORWARD, TRAIN)
    for cell, T, B, H, dtype in [
        ("RNN", 20, 1, 64, "float32"),
        ("LSTM", 20, 1, 128, "float32"),
        ("LSTM", 5, 32, 128, "bfloat16"),
        ("GRU", 10, 32, 128, "float32"),
        ("GRU", 1, 4, 128, "float64"),
    ]
]


def test_no_floor_lies_above_a_time(monkeypatch):
    monkeypatch.setattr(measure, "TURN_SECONDS", 0.0)
    monkeypatch.setattr(measure, "SETTLE_SECONDS", 0.0)
    rates = floors.rates_for(CASES, 1)
    given = {name: peers.PEERS[name] for name in ("rnnfast", "torch.nn")}
    rows = [(case, measure.measure(case, given, 0.05)) for case in CASES]
    rates.measure_again()
    for case, result in rows:
        floor = floors.floor(case, rates)
        assert min(floor.products, floor.gates, floor.weights) > 0
        assert floor.seconds <= SLACK * result.timings["rnnfast"].median, (case, floor)


def rows_of(cases, names):
    """Rows as of a measurement: a floor of 2 us, of the weights, and times of 4 us."""
    floor, timing = Floor(1e-6, 1.5e-6, 2e-6), Timing((4e-6, 4e-6, 5e-6))
    results = [Result(case, dict.fromkeys(names, timing), dict.fromkeys(names, 0.0)) for case in cases]
    return [Row(result, floor) for result in results]


@pytest.mark.parametrize("width", [80, 130])
@pytest.mark.parametrize("peers_here", [2, 3, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_table_fits_the_console(width, peers_here, dtype, monkeypatch):
    names = ["rnnfast", "torch.nn", "ONNX Runtime", "JAX"][:peers_here]
    monkeypatch.setattr(table, "PEERS", dict.fromkeys(names))
    cases = [Case("LSTM", 100, 256, 1024, 1024, mode, dtype) for mode in (FORWARD, TRAIN)]
    console = Console(width=width, file=io.StringIO())
    peaks = {"float32": 2e11, "bfloat16": 4e11, "matrix": 7e12}
    console.print(table.fitted(rows_of(cases, names), peaks, 2, console))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in console.file.getvalue()  # nothing is cut off
    assert dtype in lines[0]
    rows = [line for line in lines if "100,256,1024,1024" in line]
    assert len(rows) == 2
    for row in rows:
        assert "weights" in row
        assert row.count("4.00 us") == peers_here
        assert row.split()[-1] == "50%"
    if width == 130:
        assert "2.00 us weights" in rows[0]
    assert "matrix 7000" in " ".join(lines)


def written(folder, *cases, **changed):
    """A file of rnnfast bench, in the folder of a processor."""
    names = ["rnnfast", "torch.nn"]
    run = command.record(rows_of(cases or [Case("GRU", 10, 2, 8, 8, FORWARD)], names), Rates(2))
    run["peak_flops"] = {"float32": 2e11, "matrix": 7e12}
    (folder / "some-processor").mkdir()
    (folder / "some-processor" / "steps.json").write_text(json.dumps(run | changed))


def test_the_page_of_results_has_the_floors(tmp_path):
    written(tmp_path)
    subprocess.run([sys.executable, TABLES, "--folder", tmp_path], check=True)
    page = (tmp_path / "README.md").read_text()
    assert "| GRU T=10 B=2 I=8 H=8 forward | 1.00 (50% weights) |" in page
    assert "measured peaks float32 200, matrix 7000 GFLOP/s" in page


@pytest.mark.parametrize("inputs", [64, 65])
def test_the_page_of_results_names_every_size_that_a_column_does_not(tmp_path, inputs):
    written(tmp_path, *(Case("GRU", 10, rows, inputs, 64, FORWARD) for rows in range(1, 13)))
    subprocess.run([sys.executable, TABLES, "--folder", tmp_path], check=True)
    page = (tmp_path / "README.md").read_text()
    assert ("| H=64 |" in page) == (inputs == 64)
    assert ("| GRU T=10 B=7 I=65 H=64 forward |" in page) == (inputs == 65)


def test_the_page_of_results_refuses_another_schema(tmp_path):
    written(tmp_path, schema=3)
    done = subprocess.run(
        [sys.executable, TABLES, "--folder", tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "steps.json has schema 3; this program knows 1 and 2" in done.stderr
