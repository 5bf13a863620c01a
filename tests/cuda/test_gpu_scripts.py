"""What benchmarks/gpu/run.sh calls, on an emulated device or with parts of it replaced."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cuda_on_cpu
from rnnfast import _native
from rnnfast.stack import autograd, cuda, cuda_switch

ROOT = Path(__file__).parents[2]
PROBE = ROOT / "benchmarks/gpu/probe.cu"


def load(name, monkeypatch):
    """A program as a module."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


# --- check.py -------------------------------------------------------------------------------------
@pytest.fixture
def check(monkeypatch, capsys):
    """Runs check.py with these cases, each with what error_of returns; the status and the output."""
    module = load("gpu/check", monkeypatch)

    def run(found):
        def error_of(case, device):
            assert capsys.readouterr().out.endswith(f"{case}: ")  # printed before it runs
            if isinstance(found[case], Exception):
                raise found[case]
            return found[case]

        monkeypatch.setattr(module, "cases", lambda *_: iter(found))
        monkeypatch.setattr(module, "error_of", error_of)
        monkeypatch.setattr(sys, "argv", ["check.py"])
        monkeypatch.setattr(cuda_switch, "_mode", True)
        try:
            return module.main(), capsys.readouterr().out
        finally:
            torch.use_deterministic_algorithms(False)

    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return run, module


def test_check_fails_where_it_should(check):
    run, module = check
    case, large = module.Case("gru", "float32", 3, 2, 16), module.LARGE[0]
    assert run({case: (1e-7, True)})[0] == 0
    assert run({case: (1e-7, True), case._replace(H=300): None})[0] == 0  # no tier need take it
    for found in ((1e-7, False), (1e-3, True), (float("inf"), True), RuntimeError("illegal address")):
        status, said = run({case: found})
        assert status == 1
        assert re.search("WRONG|illegal address", said)
        assert "1 wrong" in said
    assert run({case: None})[0] == 1  # no case has run
    status, said = run({case: (1e-7, True), large: None})
    assert status == 1
    assert "WRONG: no plan" in said


# --- step.py --------------------------------------------------------------------------------------
@pytest.fixture
def step(emulated, monkeypatch):
    cuda_on_cpu.use(emulated, monkeypatch)
    monkeypatch.setattr(_native, "_cuda", emulated)
    monkeypatch.setattr(cuda, "_run", cuda._run)  # the program replaces it
    monkeypatch.setattr(
        autograd.ops,
        "forward",
        lambda config, inputs, save=False, packed=None: cuda.forward(config, inputs, save),
    )
    monkeypatch.setattr(autograd.ops, "backward", cuda.backward)
    return load("gpu/step", monkeypatch)


@pytest.mark.parametrize("shape", [["LSTM", "40", "9"], ["GRU", "24", "5", "--packed"]], ids=" ".join)
@pytest.mark.parametrize("tier", ["block", "cluster", "grid"])
def test_a_step_runs_on_the_tier(tier, shape, step, monkeypatch, capsys):
    monkeypatch.setenv("RNNFAST_CUDA_TIER", tier)
    step.main([*shape, "--steps", "3"], "cpu")
    assert f"ran on the tiers ['{tier}', '{tier}']" in capsys.readouterr().out


def test_a_step_without_the_kernels_fails(step, monkeypatch):
    monkeypatch.setattr(step, "train", lambda *_: 0.0)
    with pytest.raises(SystemExit, match=r"the launches were \[\]"):
        step.main([], "cpu")


# --- beside_cudnn.py and parts.py -----------------------------------------------------------------
ROW = {
    "shape": ["GRU", "bfloat16"],
    "tier": "cluster 1x4 / cluster 1x4",
    "us": [1.0, 2.0],
    "quartiles": [[0.9, 1.1], [1.9, 2.1]],
    "ratio": 2.0,
    "floor": 0.1,
}


def test_a_failed_row_loses_no_other(monkeypatch, tmp_path, capsys):
    module = load("beside_cudnn", monkeypatch)
    monkeypatch.setattr(module, "facts", lambda: {"device": "none"})
    shapes = module.shapes(quick=True)[:3]

    def compare(shape, forward_only):
        if shape != shapes[0]:  # the row before it is printed already
            assert str(shapes[shapes.index(shape) - 1]) in capsys.readouterr().out
        if shape == shapes[1]:
            raise RuntimeError("out of memory")
        return ROW

    monkeypatch.setattr(module, "compare", compare)
    file = tmp_path / "rows.json"
    rows, failures = module.measure(shapes, False, file)
    assert (len(rows), failures) == (2, 1)
    assert json.loads(file.read_text()) == {"device": "none", "rows": [ROW, ROW]}


def test_shapes_to_measure(monkeypatch):
    module = load("beside_cudnn", monkeypatch)
    grid, few = module.shapes(quick=False), module.constants()
    assert len(set(grid)) == len(grid)
    assert {shape.steps for shape in grid} == {1, 16, 64, 256}
    short = [shape for shape in grid if shape.steps < 256]
    assert {shape._replace(steps=256) for shape in short} <= set(grid)  # beside the long ones
    assert {shape.steps for shape in few} == {256}


def test_a_product_is_timed_with_others(monkeypatch):
    """One alone is shorter than its launch."""
    module = load("beside_cudnn", monkeypatch)
    products = []

    class Factor:
        def __matmul__(self, other):
            products.append(other)

    def interleave(runs):
        for run in runs:
            run()
        return [[3.0]]

    monkeypatch.setattr(module.torch, "randn", lambda *_, **__: Factor())
    monkeypatch.setattr(module, "interleave", interleave)
    shape = module.Shape("GRU", torch.float64, 8, 2, steps=10)
    assert module.floor(shape, True) == pytest.approx(1e3 * 3.0 * 2 / 10 / len(products))
    assert len(products) > 5


def test_parts_are_medians_of_runs(monkeypatch):
    module = load("gpu/parts", monkeypatch)
    runs = [{"products": time, "other": 1.0} for time in (3.0, 9.0, 1.0, 2.0)] + [{"other": 2.0}]
    left = iter(runs)
    monkeypatch.setattr(module, "device_times_of_one", lambda run: next(left))
    median = statistics.median([3.0, 9.0, 1.0, 2.0, 0.0])
    assert module.device_times(lambda: None) == {"products": median, "other": 1.0}


# --- probe.cu -------------------------------------------------------------------------------------
def test_probe_subtracts_clocks_in_32_bits():
    """The type of clock() has 64 bits, its counter 32: after an overflow a difference was negative."""
    text = PROBE.read_text()
    assert re.findall(r".*\bclock\(\)\).*", text) == [
        "__device__ __forceinline__ unsigned now() { return static_cast<unsigned>(clock()); }"
    ]
    assert text.count("now() - t0") == text.count("t0 = now()") == 3


@pytest.mark.slow
@pytest.mark.xdist_group("cuda_code")  # as the other compilations of test-slow for devices
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc to compile with")
def test_probe_can_be_compiled(tmp_path):
    command = ["nvcc", "-O3", "-std=c++20", "-arch=sm_90", "-c", PROBE, "-o", tmp_path / "probe.o"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "warning" not in ran.stderr
