"""The switch of the CUDA kernels: which layers run on them, and what the user is told."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cuda_on_cpu
import rnnfast
from rnnfast import _native
from rnnfast.cli import info
from rnnfast.stack import cuda, cuda_measured, cuda_plans, cuda_switch
from rnnfast.stack.config import Inputs, StackConfig
from rnnfast.stack.cuda_measured import Case, Kind

GRU = StackConfig("gru")


@pytest.fixture
def extension(emulated, monkeypatch):
    """The emulated extension, with the switch as a process finds it."""
    cuda_on_cpu.use(emulated, monkeypatch)
    monkeypatch.setattr(cuda_switch, "_mode", None)
    monkeypatch.delenv("RNNFAST_CUDA", raising=False)
    monkeypatch.delenv("RNNFAST_CUDA_TIER")
    monkeypatch.setattr(_native, "_cuda", emulated)
    return emulated


def plans(hidden=256, batch=8, config=GRU, dtype=torch.bfloat16, steps=256, **call):
    """The plans of a training step, unless ``call`` says otherwise."""
    x = torch.empty(2, batch, 4, dtype=dtype)
    options = {"training": True, "packed": False, "alone": False} | call
    return cuda_plans.plans(config, x, (hidden, batch), steps, **options)


def test_auto_takes_nothing_without_a_measurement(extension):
    assert rnnfast.cuda.mode() == "auto"
    assert not cuda_plans.is_on()
    assert plans() is None
    assert not cuda_plans.takes(GRU, torch.empty(2, 8, 4), 256)


def test_enable(extension):
    rnnfast.cuda.enable(True)
    assert rnnfast.cuda.mode() is True
    assert plans().forward.tier == "cluster"
    assert plans().backward is not None
    assert plans(training=False).backward is None
    assert cuda_plans.takes(GRU, torch.empty(2, 8, 4), 256)
    rnnfast.cuda.enable(False)
    assert plans() is None
    assert not cuda_plans.takes(GRU, torch.empty(2, 8, 4), 256)


@pytest.mark.parametrize(("value", "mode"), [("1", True), ("0", False), ("auto", "auto"), ("", "auto")])
def test_the_environment_sets_the_mode(value, mode, extension, monkeypatch):
    monkeypatch.setenv("RNNFAST_CUDA", value)
    assert rnnfast.cuda.mode() == mode
    rnnfast.cuda.enable("auto")
    assert rnnfast.cuda.mode() == "auto"  # the program has the last word


@pytest.mark.parametrize("value", ["on", None, 1, 0, "True"])
def test_other_modes_are_errors(value, extension):
    with pytest.raises(ValueError, match=f"is {value!r}; expected True, False or 'auto'"):
        rnnfast.cuda.enable(value)
    assert rnnfast.cuda.mode() == "auto"


def test_other_values_of_the_environment_are_errors(extension, monkeypatch):
    monkeypatch.setenv("RNNFAST_CUDA", "yes")
    with pytest.raises(ValueError, match="RNNFAST_CUDA is 'yes'; expected '1', '0' or 'auto'"):
        rnnfast.cuda.mode()
    assert "RNNFAST_CUDA is 'yes'" in info.cuda_state()


def test_enable_is_an_error_where_the_kernels_were_not_built(extension, monkeypatch):
    monkeypatch.setattr(_native, "_cuda", None)
    with pytest.raises(RuntimeError, match="built without the CUDA kernels"):
        rnnfast.cuda.enable(True)
    rnnfast.cuda.enable("auto")
    rnnfast.cuda.enable(False)


def test_kernels_that_cannot_be_loaded_are_not_called_unbuilt(python):
    """The message of the dynamic linker is in every place that says why no kernel runs."""
    said = python("""if True:
        import importlib.abc
        import sys
        import warnings

        class Broken(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path, target=None):
                if name == "rnnfast._cuda":
                    raise ImportError("libfoo.so.9: cannot open shared object file")

        sys.meta_path.insert(0, Broken())
        import torch
        import rnnfast
        from rnnfast import _native
        from rnnfast.cli import info
        from rnnfast.stack import cuda_plans

        assert _native._cuda is None
        print(info.cuda_state())
        try:
            rnnfast.cuda.enable(True)
        except RuntimeError as error:
            print(error)
        rnnfast.cuda.enable("auto")
        warnings.simplefilter("error")
        try:
            cuda_plans.warn_of_loop("reset=", torch.device("cuda", 0))
        except RuntimeWarning as warning:
            print(warning)
    """).stdout.splitlines()
    reason = "libfoo.so.9: cannot open shared object file"
    assert said[:2] == [
        f"built, but cannot be loaded: {reason}",
        f"rnnfast's CUDA kernels cannot be loaded: {reason}",
    ]
    assert said[2].endswith(f"the CUDA kernels, which cannot be loaded ({reason}), are faster")


def test_a_tier_alone_enables_nothing(extension, monkeypatch):
    monkeypatch.setenv("RNNFAST_CUDA_TIER", "grid")
    assert plans() is None
    rnnfast.cuda.enable(True)
    assert plans().forward.tier == "grid"
    monkeypatch.setenv("RNNFAST_CUDA_TIER", "auto")
    with pytest.raises(ValueError, match="RNNFAST_CUDA_TIER is 'auto'; expected one of 'block'"):
        plans()


# --- the table of "auto" --------------------------------------------------------------------------
TRAINING = Kind("gru", "bfloat16", True, 1, 1, False)


MULTIPROCESSORS = 12  # of the emulated device


def table(monkeypatch, capability, ratios, kind=TRAINING, multiprocessors=MULTIPROCESSORS):
    """Have the table contain the ratios of some (hidden, batch) or (hidden, batch, steps)."""
    cases = [Case(kind, *sizes, *(256,) * (3 - len(sizes)), ratio) for sizes, ratio in ratios.items()]
    grids = cuda_measured.grids_of([cuda_measured.row_of(case) for case in cases])
    key = cuda_measured.key_of(capability, multiprocessors)
    monkeypatch.setattr(cuda_measured, "TABLE", {key: grids})


def test_auto_takes_what_was_measured_to_win(extension, monkeypatch):
    won = {(128, 1): 1.5, (128, 8): 1.3, (256, 1): 1.2, (256, 8): 1.1}
    lost = {(128, 64): 0.9, (256, 64): 1.04, (64, 1): 0.7, (64, 8): 0.8}
    table(monkeypatch, "9.0", won | lost)
    for hidden, batch in [*won, (200, 8), (128, 4), (130, 7)]:
        assert plans(hidden, batch) is not None, (hidden, batch)
    for hidden, batch in [*lost, (100, 4), (129, 9), (257, 8), (63, 1), (256, 65)]:
        assert plans(hidden, batch) is None, (hidden, batch)
    for other in ({"training": False}, {"packed": True}, {"dtype": torch.float16}):
        assert plans(128, 8, **other) is None
    for config in (GRU._replace(directions=2), GRU._replace(layers=2), StackConfig("lstm")):
        assert plans(128, 8, config) is None
    x = torch.empty(2, 8, 4, dtype=torch.bfloat16)
    assert cuda_plans.takes(GRU, x, 128)
    assert not cuda_plans.takes(StackConfig("lstm"), x, 128)


@pytest.mark.parametrize(("sizes", "training"), [((448, 64), True), ((128, 8), False)])
def test_auto_believes_the_measurement_and_no_estimate(sizes, training, extension, monkeypatch):
    """For these layers the cost model expects cuDNN to be faster."""
    rnnfast.cuda.enable(True)
    assert plans(*sizes, training=training) is None
    rnnfast.cuda.enable("auto")
    table(monkeypatch, "9.0", {sizes: 2.0}, TRAINING._replace(training=training))
    assert plans(*sizes, training=training) is not None


def test_auto_takes_no_shorter_sequence_than_was_measured(extension, monkeypatch):
    """Of several that were measured the longest one that is not longer than the call's counts."""
    table(monkeypatch, "9.0", {(128, 8): 1.5})
    assert plans(128, 8, steps=255) is None
    assert plans(128, 8, steps=1000) is not None
    table(monkeypatch, "9.0", {(128, 8, 1): 1.5, (128, 8, 16): 0.9, (128, 8, 256): 1.3})
    for steps, wins in {1: True, 15: True, 16: False, 255: False, 256: True, 257: True}.items():
        assert (plans(128, 8, steps=steps) is not None) == wins, steps
    table(monkeypatch, "9.0", {(128, 8, 16): 1.5, (128, 64, 256): 1.5})
    assert plans(128, 32, steps=16) is None  # the larger batch was not measured with so few steps
    assert plans(128, 32, steps=256) is not None


def test_the_steps_of_a_call_are_those_that_auto_sees(extension, monkeypatch):
    seen = []
    monkeypatch.setattr(cuda_measured, "TABLE", {"9.0": {}})
    monkeypatch.setattr(
        cuda_measured, "wins", lambda device, kind, sizes, steps: seen.append((kind.packed, steps))
    )
    weights = [torch.zeros(size) for size in ((24, 4), (24, 8), (24,), (24,))]
    x, rows = torch.zeros(5, 3, 4), torch.tensor([3, 3, 2, 1])
    cuda.forward(GRU, Inputs(x, None, None, weights))
    cuda.forward(GRU._replace(batch_first=True), Inputs(x, None, None, weights))
    cuda.forward(GRU, Inputs(x[0, :1].expand(9, 4), None, None, weights, rows))
    assert seen == [(False, 5), (False, 3), (True, 4)]


def test_auto_takes_nothing_that_another_device_measured(extension, monkeypatch):
    table(monkeypatch, "8.0", {(128, 8): 1.5})
    assert plans(128, 8) is None
    table(monkeypatch, "9.0", {(128, 8): 1.5}, multiprocessors=132)  # this one may be a part of it
    assert plans(128, 8) is None
    table(monkeypatch, "9.0", {(128, 8): 1.5})
    assert plans(128, 8) is not None


def test_float32_is_two_kinds(extension, monkeypatch):
    table(monkeypatch, "9.0", {(128, 8): 1.5}, TRAINING._replace(dtype="tf32"))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert plans(128, 8, dtype=torch.float32) is not None
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert plans(128, 8, dtype=torch.float32) is None


def test_the_table_of_the_package_can_be_read():
    for grids in cuda_measured.read(cuda_measured.FILE).values():
        for measured in [case for grid in grids.values() for case in grid.values()]:
            assert all(ratio > 0 for ratio in measured.values())


def test_the_table_is_made_from_benchmarks(extension, monkeypatch, tmp_path):
    """benchmarks/gpu/table.py writes what "auto" reads."""
    file, table_file = tmp_path / "training.json", tmp_path / "table.json"
    tiers = {8: "cluster 4x4 / cluster 4x4", 16: "grid 1x4 / grid 1x4", 32: "cuDNN / cuDNN"}
    quartiles = {8: [[0.9, 1.0], [1.5, 9.0]], 16: [[0.9, 1.5], [1.5, 9.0]], 32: [[1, 1], [9, 9]]}
    rows = [
        {
            "case": [*TRAINING, 128, batch],
            "steps": 64,
            "tier": tier,
            "ratio": 5.0,  # of the medians
            "quartiles": quartiles[batch],
        }
        for batch, tier in tiers.items()
    ]
    facts = {"device": "A", "capability": "9.0", "multiprocessors": MULTIPROCESSORS}
    facts |= {"driver": "580", "torch": "2.13", "cudnn": 91000, "commit": "abc"}
    file.write_text(json.dumps(facts | {"rows": rows}))
    table_file.write_text('{"8.0 with 108 multiprocessors": {"device": "B", "cases": []}}')
    maker = Path(__file__).parents[2] / "benchmarks/gpu/table.py"
    command = [sys.executable, str(maker), str(file), "--table", str(table_file)]
    for _ in range(2):  # the second time replaces the cases of the first
        subprocess.run(command, check=True)
    written, key = json.loads(table_file.read_text()), cuda_measured.key_of("9.0", MULTIPROCESSORS)
    assert set(written) == {"8.0 with 108 multiprocessors", key}
    assert (written[key]["driver"], written[key]["commit"]) == ("580", "abc")
    monkeypatch.setattr(cuda_measured, "TABLE", cuda_measured.read(table_file))
    assert cuda_measured.counts(key) == (1, 2)
    assert plans(128, 8, steps=64) is not None
    assert plans(128, 8, steps=63) is None
    assert plans(128, 16) is None
    assert plans(128, 32) is None


# --- rnnfast info ---------------------------------------------------------------------------------
def test_info_says_what_the_switch_says(extension, monkeypatch):
    assert info.cuda_state().splitlines() == [
        "built; mode auto (the default): layers that were measured to win",
        "no device",
    ]
    monkeypatch.setattr(cuda_switch, "_mode", None)
    monkeypatch.setenv("RNNFAST_CUDA", "1")
    monkeypatch.setenv("RNNFAST_CUDA_TIER", "grid")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"Emulated {number}")
    said = info.cuda_state()
    assert "mode True (RNNFAST_CUDA=1): layers that fit the device" in said
    assert "tier: grid (RNNFAST_CUDA_TIER)" in said
    assert "0: Emulated 0, compute capability 9.0" in said
    device = f"compute capability 9.0 with {MULTIPROCESSORS} multiprocessors"
    assert f"auto: no layer, since no device of {device} was measured" in said
    assert "lstm bfloat16: block to H=" in said
    table(monkeypatch, "9.0", {(128, 8): 1.5, (128, 16): 0.9})
    assert "auto: the kernels win in 1 of 2 measured cases" in info.cuda_state()


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        ({"capability": 75}, "compute capability is 7.5; the kernels need 8.0 or later"),
        ({"cudaDeviceGetAttribute": 35}, "asking for the properties of the device: .*error 35"),
    ],
    ids=["capability", "driver"],
)
def test_a_refusing_device(chosen, reason, emulated, extension, monkeypatch):
    """It is no error, in any mode, and `rnnfast info` has the reason."""
    monkeypatch.setattr(cuda_plans, "_WARNED", set())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "Emulated")
    runtime = cuda_on_cpu.Runtime(emulated)
    runtime.choose(**chosen)
    try:
        said = "\n".join(info.cuda_device_lines(0))
        assert re.search(f"CUDA device 0 refuses rnnfast's kernels .*{reason}", said)
        assert "lstm bfloat16: no tier" in said
        cuda_plans._WARNED.clear()
        monkeypatch.setattr(cuda_plans, "PLANS", cuda_plans.Plans())
        table(monkeypatch, "9.0", {(128, 8): 1.5})
        if "capability" in chosen:
            assert plans(128, 8) is None
        else:
            with pytest.warns(RuntimeWarning, match=reason):
                assert plans(128, 8) is None
    finally:
        runtime.reset()
