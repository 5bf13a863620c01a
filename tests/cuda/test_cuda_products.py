"""What torch computes for the CUDA wing: in which precision, how often, and from which memory."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cuda_on_cpu
from rnnfast.stack import cuda, cuda_precision, cuda_products, precision
from rnnfast.stack.config import CELLS, Inputs, StackConfig

LSTM = StackConfig("lstm")


@pytest.fixture(autouse=True)
def wing(emulated, monkeypatch):
    cuda_on_cpu.use(emulated, monkeypatch)


def layers(config, dtype=torch.float32, packed=False):
    """The inputs of a stack with T=5, B=3, I=4, H=8."""
    rows = CELLS[config.cell].weight_blocks * 8
    weights = []
    for number in range(config.layers * config.directions):
        width = 4 if number < config.directions else config.directions * 8
        weights += [torch.randn(s).mul(0.2) for s in [(rows, width), (rows, 8), (rows,), (rows,)]]
    sizes = torch.tensor([3, 2, 2, 1, 1]) if packed else None
    shape = (9, 4) if packed else (3, 5, 4) if config.batch_first else (5, 3, 4)
    tensors = [torch.randn(shape), *weights]
    x, *weights = (t.to(dtype) for t in tensors)
    return Inputs(x, None, None, weights, sizes)


def train(config, inputs):
    """A forward and a backward pass; the gradients."""
    out = cuda.forward(config, inputs, save=True)
    grads = (torch.ones_like(out.y), None, None, None)
    return cuda.backward(
        config, inputs, out.y, out.saved, grads, [t is not None for t in inputs.tensors]
    )


class Seen(TorchDispatchMode):
    """Counts torch's operators."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


# --- TF32 -----------------------------------------------------------------------------------------
@pytest.fixture
def settings(monkeypatch):
    """The setting of torch's products during each product."""
    seen = []

    def watched(function):
        def run(*args):
            seen.append(cuda_precision._setting())
            return function(*args)

        return run

    monkeypatch.setattr(cuda.F, "linear", watched(cuda.F.linear))
    for name in ("of_input", "of_w_ih", "of_w_hh"):
        function = getattr(cuda_products.Products, name)
        monkeypatch.setattr(cuda_products.Products, name, watched(function))
    return seen


@pytest.mark.parametrize("before", ["none", "ieee", "tf32"])
@pytest.mark.parametrize("allowed", [False, True])
def test_products_are_in_the_precision_of_the_recurrence(allowed, before, settings, monkeypatch):
    if not cuda_precision._HAS_OWN_SETTING:
        pytest.skip("torch before 2.9 has no setting for CUDA alone")
    matmul = torch.backends.cuda.matmul
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    matmul.fp32_precision = before
    try:
        train(LSTM, layers(LSTM))
        assert settings == ["tf32" if allowed else "ieee"] * 4
        assert matmul.fp32_precision == before
    finally:
        matmul.fp32_precision = "none"


@pytest.mark.parametrize("before", ["highest", "high", "medium"])
@pytest.mark.parametrize("allowed", [False, True])
def test_with_the_setting_of_older_torch(allowed, before, settings, monkeypatch):
    monkeypatch.setattr(cuda_precision, "_HAS_OWN_SETTING", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    torch.set_float32_matmul_precision(before)
    try:
        train(LSTM, layers(LSTM))
        assert settings == ["high" if allowed else "highest"] * 4
        assert torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision("highest")


def test_other_dtypes_leave_the_setting_alone(settings):
    train(LSTM, layers(LSTM, torch.bfloat16))
    assert settings == [cuda_precision._setting()] * 4


def test_threads_share_the_setting(monkeypatch):
    """The last thread restores it, and an error restores it too."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    before = cuda_precision._setting()
    one, two = (cuda_precision.products(torch.float32) for _ in range(2))
    one.__enter__()
    during = cuda_precision._setting()
    two.__enter__()
    one.__exit__(None, None, None)
    assert cuda_precision._setting() == during != before
    two.__exit__(None, None, None)
    assert cuda_precision._setting() == before
    with pytest.raises(ZeroDivisionError), cuda_precision.products(torch.float32):
        1 / 0  # noqa: B018
    assert cuda_precision._setting() == before


# --- packed sequences -----------------------------------------------------------------------------
@pytest.mark.parametrize("reverse", [False, True])
def test_the_row_before(reverse):
    random = torch.Generator().manual_seed(1)
    for _ in range(50):
        lengths = torch.randint(1, 7, (4,), generator=random)
        sizes = [int((lengths > t).sum()) for t in range(int(lengths.max()))]
        first = [sum(sizes[:t]) for t in range(len(sizes) + 1)]
        expected = []
        for t, size in enumerate(sizes):
            other = t + 1 if reverse else t - 1
            for b in range(size):
                has_other = 0 <= other < len(sizes) and b < sizes[other]
                expected.append(first[other] + b if has_other else first[-1] + b)
        found = cuda_products.row_before(torch.tensor(first), first[-1], reverse)
        assert found.tolist() == expected


def test_the_row_before_is_computed_without_the_host():
    """A tensor of device meta has no values to read."""
    first = torch.empty(6, dtype=torch.int64, device="meta")
    assert cuda_products.row_before(first, 9, False).device.type == "meta"


def test_tables_are_made_once_a_call(monkeypatch):
    config = LSTM._replace(layers=2, directions=2)
    made = []
    for name in ("_on_device", "row_before"):
        function = getattr(cuda, name)
        spy = lambda *a, _name=name, _function=function: (made.append(_name), _function(*a))[1]  # noqa: E731
        monkeypatch.setattr(cuda, name, spy)
    assert train(config, layers(config, packed=True)) is not None
    assert made.count("_on_device") == 2  # of forward and of backward
    assert made.count("row_before") == 2  # of each direction
    made.clear()
    train(config, layers(config))
    assert made == []


class Table:
    """A tensor in the host's memory, which records how it goes to a device."""

    def __init__(self):
        self.steps = []

    def pin_memory(self):
        self.steps.append("pinned")
        return self

    def to(self, device, non_blocking=False):
        self.steps.append((str(device), non_blocking))
        return self


def test_the_table_goes_to_the_device_without_waiting(monkeypatch):
    table, device = Table(), torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert cuda._on_device(table, device) is table
    assert table.steps == ["pinned", ("cuda:1", True)]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"cannot be captured in a CUDA graph.*pad the batch"):
        cuda._on_device(table, device)


# --- copies and sums ------------------------------------------------------------------------------
COPIES = {"clone", "copy_", "contiguous", "_to_copy"}


@pytest.mark.parametrize("layer_count", [1, 2])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_batch_first_copies_nothing_more(cell, layer_count):
    """Strides say where the batch is: no copy of x, of the output or of a gradient."""
    seen = {}
    for batch_first in (False, True):
        config = StackConfig(cell, layers=layer_count, batch_first=batch_first)
        inputs = layers(config)
        with Seen() as mode:
            out = cuda.forward(config, inputs, save=True)
            assert COPIES.isdisjoint(mode.names)
            grads = (torch.ones_like(out.y), None, None, None)
            wanted = [t is not None for t in inputs.tensors]
            found = cuda.backward(config, inputs, out.y, out.saved, grads, wanted)
        assert out.y.is_contiguous()
        assert all(t.is_contiguous() for t in found if t is not None)
        seen[batch_first] = [name for name in mode.names if name in COPIES]
    assert seen[True] == seen[False]


@pytest.mark.parametrize("cell", CELLS)
def test_biases_share_one_sum_and_no_memory(cell):
    config = StackConfig(cell)
    with Seen() as mode:
        *_, b_ih, b_hh = train(config, layers(config))
    assert mode.names.count("sum") == 1
    assert b_ih.untyped_storage().data_ptr() != b_hh.untyped_storage().data_ptr()


def test_a_setting_that_follows_another_one_still_does(settings):
    """torch.backends.fp32_precision is the setting of all backends that have none of their own."""
    if not cuda_precision._HAS_OWN_SETTING:
        pytest.skip("torch before 2.9 has no such setting")
    matmul = torch.backends.cuda.matmul
    try:
        matmul.fp32_precision = "none"
        torch.backends.fp32_precision = "tf32"
        train(LSTM, layers(LSTM))
        assert matmul.fp32_precision == "tf32"
        torch.backends.fp32_precision = "ieee"
        assert matmul.fp32_precision == "ieee"
    finally:
        torch.backends.fp32_precision = "none"


@pytest.mark.parametrize(("own", "setting"), [("none", 0), ("ieee", 0), ("tf32", 1), ("bf16", 2)])
def test_a_setting_of_cuda_alone_is_no_error_on_a_cpu_with_a_matrix_unit(own, setting, monkeypatch):
    """Then torch does not tell the setting of both."""
    if not cuda_precision._HAS_OWN_SETTING:
        pytest.skip("torch before 2.9 has no setting for CUDA alone")
    monkeypatch.setattr(precision, "_HAS_FASTER_FLOAT32", True)
    cpu = torch.backends.mkldnn.matmul
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        cpu.fp32_precision = own
        assert precision.float32_setting() == setting
    finally:
        torch.backends.cuda.matmul.fp32_precision = cpu.fp32_precision = "none"
