"""What the CUDA wing asks of a device and its runtime, and what it does where they refuse.

The emulated device's runtime records every call, and returns the errors that a test has chosen.
"""

from __future__ import annotations

import re
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import cuda_on_cpu
from rnnfast.stack import cuda, cuda_plans
from rnnfast.stack.config import CELLS, Inputs, StackConfig

INSUFFICIENT_DRIVER, NO_KERNEL_IMAGE, ILLEGAL_ADDRESS, TOO_LARGE = 35, 209, 700, 720
LSTM = StackConfig("lstm")


@pytest.fixture
def runtime(emulated, monkeypatch, tmp_path):
    """The runtime of an emulated device of which nothing was asked yet; the CUDA wing runs on it."""
    extension = cuda_on_cpu.fresh(emulated, tmp_path)
    cuda_on_cpu.use(extension, monkeypatch)
    monkeypatch.setattr(cuda_plans, "_WARNED", set())
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return cuda_on_cpu.Runtime(extension)


def plan(hidden, batch, tier=None, backward=False, cell="lstm", dtype="bfloat16", directions=1):
    sizes = (hidden, batch, directions)
    return cuda_plans._cuda.plan(0, CELLS[cell].number, dtype, False, backward, sizes, tier)


def layer(hidden=16, batch=2, config=LSTM, dtype=torch.float32, steps=3):
    """The inputs of a stack."""
    rows = CELLS[config.cell].weight_blocks * hidden
    weights = []
    for number in range(config.layers * config.directions):
        width = 4 if number < config.directions else config.directions * hidden
        shapes = [(rows, width), (rows, hidden), (rows,), (rows,)]
        weights += [torch.randn(s).mul(0.1).to(dtype) for s in shapes]
    return Inputs(torch.randn(steps, batch, 4).to(dtype), None, None, weights)


def backward(config, inputs, out):
    grads = (torch.ones_like(out.y), None, None, None)
    wanted = [t is not None for t in inputs.tensors]
    return cuda.backward(config, inputs, out.y, out.saved, grads, wanted)


# --- refusals -------------------------------------------------------------------------------------
REFUSALS = {
    "capability": ({"capability": 75}, "compute capability is 7.5; the kernels need 8.0 or later"),
    "driver": ({"cudaDeviceGetAttribute": INSUFFICIENT_DRIVER}, "properties of the device: .*error 35"),
    "image": ({"cudaFuncSetAttribute": NO_KERNEL_IMAGE}, "all shared memory: .*error 209"),
    "launch": ({"cudaLaunchKernelEx": TOO_LARGE}, "launching a recurrence: .*error 720"),
    "current": ({"current_device": 1}, "current CUDA device is 1; the tensors are on 0"),
}


@pytest.mark.parametrize("save", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_refusal_is_one_warning_and_no_kernel(refusal, save, runtime):
    chosen, reason = REFUSALS[refusal]
    runtime.choose(**chosen)
    with pytest.warns(RuntimeWarning, match=f"such layers: .*{reason}"):
        assert cuda.forward(LSTM, layer(), save) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cuda.forward(LSTM, layer(), save) is None
        assert cuda.forward(LSTM, layer(hidden=32), save) is None
    assert runtime.last_error == 0  # the runtime's next user must not find our error


def test_a_device_that_is_not_current_is_not_refused_for_ever(runtime):
    """The program may make it current later."""
    runtime.choose(current_device=1)
    with pytest.warns(RuntimeWarning, match="current CUDA device is 1"):
        assert cuda.forward(LSTM, layer()) is None
    runtime.choose(current_device=0)
    assert cuda.forward(LSTM, layer()) is not None
    runtime.choose(current_device=1)
    assert cuda.forward(LSTM, layer()) is None  # by the plan that is there
    runtime.choose(current_device=0)
    assert cuda.forward(LSTM, layer()) is not None


def test_backward_is_refused_too(runtime):
    inputs = layer()
    out = cuda.forward(LSTM, inputs, save=True)
    runtime.choose(cudaLaunchKernelEx=TOO_LARGE)
    with pytest.warns(RuntimeWarning, match="launching a recurrence"):
        assert backward(LSTM, inputs, out) is None


def test_a_device_without_room_for_clusters_and_grids(runtime):
    """As a part of a GPU may be, or a GPU that another process uses."""
    none = {f"clusters_of_{size}": 0 for size in (2, 4, 8, 16)}
    runtime.choose(blocks_of_a_multiprocessor=0, multiprocessors=132, **none)
    assert plan(64, 8).tier == "block"
    said = "its 132 multiprocessors hold 0 blocks of a grid at once, 0 clusters of 2, .*needs more"
    with pytest.raises(cuda_plans.refused(), match=said):
        plan(512, 8)
    runtime.choose(blocks_of_a_multiprocessor=1)
    assert plan(512, 8).tier == "grid"
    runtime.choose(clusters_of_16=7)
    assert plan(512, 8).tier == "cluster"


def test_a_layer_that_no_device_could_take_is_not_a_refusal(runtime):
    assert plan(1 << 14, 8) is None


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("cudaLaunchKernelEx", "launching a recurrence of T=3, B=2, H=16 on tier grid"),
        ("cudaMemsetAsync", "clearing counters"),
    ],
)
def test_other_errors_reach_the_user(function, said, runtime, monkeypatch):
    monkeypatch.setenv("RNNFAST_CUDA_TIER", "grid")
    runtime.choose(**{function: ILLEGAL_ADDRESS})
    with pytest.raises(RuntimeError, match=f"rnnfast: {said}.*error 700"):
        cuda.forward(LSTM, layer())


# --- what the runtime is asked --------------------------------------------------------------------
@pytest.mark.parametrize("tier", ["block", "cluster", "grid"])
def test_calls_of_a_training_step(tier, runtime, monkeypatch):
    monkeypatch.setenv("RNNFAST_CUDA_TIER", tier)
    config, most = LSTM._replace(layers=2, directions=2), 200 << 10
    runtime.choose(shared_bytes=most)
    for batch in (2, 3):
        inputs = layer(batch=batch, config=config)
        out = cuda.forward(config, inputs, save=True)
        assert backward(config, inputs, out) is not None
    assert runtime.calls("cudaSetDevice") == []
    # Once for the kernel of forward and once for that of backward, to what the device has.
    attributes = runtime.calls("cudaFuncSetAttribute")
    assert attributes.count(f"cudaFuncSetAttribute(shared bytes, {most})") == 2
    assert attributes.count("cudaFuncSetAttribute(large clusters, 1)") == 2
    assert len(attributes) == 4
    for size in (2, 4, 8, 16):
        assert f"cudaOccupancyMaxActiveClusters({size})" in runtime.calls()
    launches = runtime.calls("cudaLaunchKernelEx")
    assert len(launches) == 2 * 2 * 2  # batches, layers, passes
    how = {"block": "blocks", "cluster": "clusters of", "grid": "cooperative"}[tier]
    assert all(call.startswith(f"cudaLaunchKernelEx({how}") for call in launches)
    assert len(runtime.calls("cudaMemsetAsync")) == (len(launches) if tier == "grid" else 0)


def test_a_device_without_clusters(runtime):
    runtime.choose(capability=86, multiprocessors=84)
    assert plan(512, 8).tier == "grid"
    assert runtime.calls("cudaOccupancyMaxActiveClusters") == []
    assert not [c for c in runtime.calls("cudaFuncSetAttribute") if "large clusters" in c]


@pytest.mark.parametrize("batch", [57, 64, 100, 128])
def test_clusters_run_in_one_wave(batch, runtime):
    """An H100 has room for 8 clusters of 16 by its multiprocessors, but may hold only 7."""
    runtime.choose(multiprocessors=132, clusters_of_16=7)
    for backward in (False, True):
        found = plan(512, batch, backward=backward)
        assert found.blocks == 16
        assert found.groups <= 7
        assert found.groups * found.rows >= batch


class Guard:
    """torch.cuda as the wing uses it, of a program whose current device is ``current``."""

    def __init__(self, runtime, monkeypatch, current):
        self.runtime, self.current, self.entered = runtime, current, []
        runtime.choose(current_device=current)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "device", self._guard)

    @contextmanager
    def _guard(self, number):
        before = self.current
        self.entered.append(number)
        self.current = number
        self.runtime.choose(current_device=number)
        yield
        self.current = before
        self.runtime.choose(current_device=before)


def test_the_guard_is_torchs(runtime, monkeypatch):
    """Of a program whose current device is another one than that of its tensors."""
    guard = Guard(runtime, monkeypatch, current=1)
    inputs = layer(config=LSTM._replace(layers=2))
    out = cuda.forward(LSTM._replace(layers=2), inputs, save=True)
    assert backward(LSTM._replace(layers=2), inputs, out) is not None
    assert guard.entered == [0, 0]  # once for each pass
    assert guard.current == 1
    assert runtime.calls("cudaSetDevice") == []


def test_the_current_device_needs_no_guard(runtime, monkeypatch):
    guard = Guard(runtime, monkeypatch, current=0)
    inputs = layer()
    out = cuda.forward(LSTM, inputs, save=True)
    assert backward(LSTM, inputs, out) is not None
    assert guard.entered == []


# --- sizes ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("batch", [10**6, 10**8, 2**31 - 1])
@pytest.mark.parametrize("hidden", [8, 128, 256, 1024])
def test_plans_of_enormous_batches(hidden, batch, runtime):
    runtime.choose(multiprocessors=132)
    for backward in (False, True):
        found = plan(hidden, batch, backward=backward)
        if found is None:
            assert hidden == 1024 or batch == 2**31 - 1
            continue
        assert 0 < found.shared_bytes <= 227 << 10
        assert found.groups * found.rows >= batch > (found.groups - 1) * found.rows


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(("steps", "batch"), [((1 << 24) + 1, 1), (1, (1 << 30) + 1), (1, 1 << 31)])
def test_sizes_beyond_the_kernels(steps, batch, batch_first, runtime):
    """No error: torch computes them. The memory of these inputs is one element."""
    config = LSTM._replace(batch_first=batch_first)
    shape = (batch, steps, 4) if batch_first else (steps, batch, 4)
    inputs = layer()._replace(x=torch.zeros(1, 1, 1).expand(shape))
    assert cuda.forward(config, inputs, save=True) is None
    assert runtime.calls("cudaLaunchKernelEx") == []


def test_the_sizes_are_those_of_the_kernels():
    source = Path(__file__).parents[2] / "csrc/cuda"
    text = (source / "recurrence.h").read_text() + (source / "plan.cpp").read_text()
    found = dict(re.findall(r"constexpr int (most_steps|most_rows) = 1 << (\d+);", text))
    assert {name: 1 << int(power) for name, power in found.items()} == {
        "most_steps": cuda.MOST_STEPS,
        "most_rows": cuda.MOST_ROWS,
    }


@pytest.mark.parametrize(
    ("hidden", "batch", "directions", "rows"),
    [
        *((128, 1, 1, 1), (128, 32, 1, 1), (128, 132, 1, 1), (128, 133, 1, 2), (128, 67, 2, 2)),
        (64, 600, 1, 5),
    ],
)
def test_a_group_has_few_rows(hidden, batch, directions, rows, runtime):
    """One while blocks are free: a block's time grows with its rows."""
    runtime.choose(multiprocessors=132)
    found = plan(hidden, batch, directions=directions)
    assert (found.tier, found.rows) == ("block", rows)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("hidden", [256, 512])
def test_clusters_are_large_where_multiprocessors_are_idle(hidden, backward, runtime):
    runtime.choose(multiprocessors=132)
    alone, many = (plan(hidden, batch, "cluster", backward) for batch in (1, 512))
    assert alone.blocks == 16
    assert alone.rows == 1
    assert many.blocks <= alone.blocks
    if hidden == 256:  # smaller clusters have registers for it too
        assert many.blocks < alone.blocks


# --- where cuDNN is expected to be faster ---------------------------------------------------------
def takes(hidden, batch, config=LSTM, dtype=torch.bfloat16, **call):
    x = torch.empty(2, batch, 4, dtype=dtype)
    options = {"training": True, "packed": False, "alone": False} | call
    return cuda_plans.plans(config, x, (hidden, batch), 2, **options) is not None


@pytest.fixture
def by_cost(runtime, monkeypatch):
    """A device of an H200's size, with no tier forced."""
    runtime.choose(multiprocessors=132)
    monkeypatch.delenv("RNNFAST_CUDA_TIER")


def test_inference_where_cudnn_keeps_its_weights(by_cost, monkeypatch):
    for config, widest in ((LSTM, 192), (StackConfig("gru"), 192), (StackConfig("rnn_tanh"), 384)):
        assert not takes(widest, 8, config, training=False)
        assert takes(widest + 1, 8, config, training=False)
        assert takes(widest, 8, config)  # in training
        assert takes(widest, 8, config, training=False, alone=True)  # cuDNN has no such call
        assert takes(32, 8, config, torch.float64, training=False)
    assert takes(128, 8, StackConfig("gru_original"), training=False)
    monkeypatch.setenv("RNNFAST_CUDA_TIER", "first")
    assert takes(128, 8, training=False)


def test_a_grid_with_many_values(by_cost, monkeypatch):
    assert plan(1024, 15).tier == "grid"
    assert takes(1024, 15)
    assert not takes(1024, 16)
    assert takes(1024, 16, alone=True)
    assert plan(512, 64).tier == "cluster"
    assert takes(512, 64)
    monkeypatch.setenv("RNNFAST_CUDA_TIER", "grid")
    assert takes(1024, 16)
