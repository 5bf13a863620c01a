"""Modules on a GPU where no CUDA kernel runs: what a call costs, and what the user is told."""

from __future__ import annotations

import warnings
from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import PackedSequence

import rnnfast
from rnnfast.compilers import operator
from rnnfast.stack import autograd, cuda_plans, cuda_switch, in_torch, ops, reference, sequences
from rnnfast.stack.config import CELLS, Inputs, StackConfig


class OnGpu:
    """An input of which the module may ask only where it is."""

    is_cuda = True

    def __getattr__(self, name):
        raise AssertionError(f"the module asked for {name}")


class Pretended(torch.Tensor):
    """A tensor on the CPU that says it is on a GPU. No kernel takes a subclass."""

    is_cuda = True


@pytest.fixture(params=[False, "auto", None], ids=["off", "auto", "not built"])
def off(request, monkeypatch):
    """Every way in which no kernel runs."""
    monkeypatch.setattr(cuda_plans, "_cuda", None if request.param is None else object())
    monkeypatch.setattr(cuda_switch, "_mode", bool(request.param is None) or request.param)
    monkeypatch.setattr(cuda_plans, "_WARNED", set())
    return request.param


LAYERS = [rnnfast.LSTM(3, 4), rnnfast.GRU(3, 4, 2), rnnfast.RNN(3, 4)]
CELL_MODULES = [rnnfast.LSTMCell(3, 4), rnnfast.GRUCell(3, 4), rnnfast.RNNCell(3, 4)]


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("module", LAYERS + CELL_MODULES, ids=lambda m: type(m).__name__)
def test_torch_computes_at_once(module, grad, off, monkeypatch):
    """The module asks where the input is, and nothing else of an input that is no plain tensor."""
    torchs = next(c for c in type(module).__mro__ if c.__module__.startswith("torch.nn"))
    monkeypatch.setattr(torchs, "forward", lambda self, input, hx: (self, input, hx))
    given = OnGpu()
    with torch.set_grad_enabled(grad):
        assert module(given, 7) == (module, given, 7)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("module", LAYERS + CELL_MODULES, ids=lambda m: type(m).__name__)
def test_a_plain_tensor_needs_no_autograd_and_no_second_look(module, grad, off, monkeypatch):
    torchs = next(c for c in type(module).__mro__ if c.__module__.startswith("torch.nn"))
    monkeypatch.setattr(torchs, "forward", lambda self, input, hx: "torch's")
    monkeypatch.setattr(ops, "call_module", lambda *_: None)  # what it returns on a GPU
    for function in ("stack", "differentiable"):
        monkeypatch.setattr(autograd, function, None)
    for function in ("_fitting", "_precision", "_run"):
        monkeypatch.setattr(type(module), function, None)
    x = torch.randn((2, 3) if isinstance(module, torch.nn.RNNCellBase) else (5, 2, 3))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    with torch.set_grad_enabled(grad):
        assert module(x) == "torch's"


@pytest.mark.parametrize("module", CELL_MODULES, ids=lambda m: type(m).__name__)
def test_cells_are_torchs_where_the_kernels_are_on_too(module, monkeypatch):
    monkeypatch.setattr(cuda_plans, "_cuda", object())
    monkeypatch.setattr(cuda_switch, "_mode", True)
    torchs = next(c for c in type(module).__mro__ if c.__module__.startswith("torch.nn"))
    monkeypatch.setattr(torchs, "forward", lambda self, input, hx: "torch's")
    assert module(OnGpu()) == "torch's"


def on_gpu(*shape):
    return torch.randn(shape).as_subclass(Pretended)


@pytest.mark.parametrize(
    ("module", "options", "what"),
    [
        (rnnfast.GRU(3, 4), {"reset": torch.zeros(5, 2, dtype=torch.bool)}, "reset="),
        (rnnfast.GRU(3, 4, reset_after=False), {}, "reset_after=False"),
        (rnnfast.LSTM(3, 4, coupled_gates=True), {}, "coupled_gates=True"),
        (rnnfast.LSTM(3, 4), {"return_cell_states": True}, "return_cell_states=True"),
    ],
    ids=["reset", "reset_after", "coupled_gates", "cell_states"],
)
def test_a_loop_of_operators_is_one_warning_with_its_cure(module, options, what, off):
    cure = "were not built" if off is None else r"rnnfast\.cuda\.enable\(True\)"
    with pytest.warns(RuntimeWarning, match=f"a layer with {what} runs on .* as a loop .*{cure}"):
        module(on_gpu(5, 2, 3), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(on_gpu(5, 2, 3), **options)


def test_a_loop_where_the_kernels_are_on(monkeypatch):
    monkeypatch.setattr(cuda_plans, "_cuda", object())
    monkeypatch.setattr(cuda_switch, "_mode", True)
    monkeypatch.setattr(cuda_plans, "_WARNED", set())
    monkeypatch.setattr(cuda_plans, "takes", lambda *_: False)
    with pytest.warns(RuntimeWarning, match="no CUDA kernel takes this layer"):
        rnnfast.GRU(3, 4, reset_after=False)(on_gpu(5, 2, 3))


def test_calls_that_torch_computes_and_cells_do_not_warn(off):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rnnfast.GRU(3, 4)(on_gpu(5, 2, 3))
        rnnfast.GRUCell(3, 4, reset_after=False)(on_gpu(2, 3))
        rnnfast.GRU(3, 4, reset_after=False)(torch.randn(5, 2, 3))


def stacks():
    """Configurations, and what they get beside weights."""
    for cell in CELLS:
        config = StackConfig(cell, layers=2, directions=2)
        yield config, {}
        yield config._replace(batch_first=True, bias=False), {"states": True}
        yield config, {"packed": True, "states": True}
        yield config, {"packed": True, "reset": True}
        yield config._replace(directions=1, cell_states=config.has_c), {}


def name(value):
    return f"{value.cell}-{value.directions}" if isinstance(value, StackConfig) else "-".join(value)


def inputs_of(config, packed=False, states=False, reset=False):
    """T=5, B=3, I=4, H=8 in float64."""
    rows, number = CELLS[config.cell].weight_blocks * 8, config.layers * config.directions
    weights = []
    for k in range(number):
        width = 4 if k < config.directions else config.directions * 8
        weights += [torch.randn(rows, width), torch.randn(rows, 8)]
        weights += [torch.randn(rows), torch.randn(rows)] if config.bias else []
    sizes = torch.tensor([3, 2, 2, 1, 1]) if packed else None
    x = torch.randn((9, 4) if packed else (3, 5, 4) if config.batch_first else (5, 3, 4))
    h0, c0 = (torch.randn(number, 3, 8) if states else None for _ in range(2))
    tensors = [x, h0, c0 if config.has_c else None, *(w * 0.2 for w in weights)]
    doubles = [t if t is None else t.double() for t in tensors]
    flags = torch.rand(x.shape[:-1]) < 0.3 if reset else None
    return Inputs(*doubles[:3], doubles[3:], sizes, flags)


@pytest.mark.parametrize(("config", "options"), [*stacks()], ids=name)
def test_a_compiled_program_whose_layer_no_kernel_takes(config, options, monkeypatch):
    """Its layer is computed by torch's operator, forward and backward."""
    monkeypatch.setattr(ops, "forward", lambda *_, **__: None)
    monkeypatch.setattr(ops, "backward", lambda *_, **__: None)
    inputs = inputs_of(config, **options)
    true = reference.stack(config, inputs)
    on_gpu = inputs._replace(x=inputs.x.as_subclass(Pretended))
    with torch.no_grad():  # as the dispatcher calls it
        y, h_n, c_n, cell_states, saved = operator._forward(*on_gpu, *config, None, True)
    got = [y, h_n, c_n if config.has_c else None, cell_states if config.cell_states else None]
    for value, expected in zip(got, true[:4], strict=True):
        assert (value is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(value.as_subclass(torch.Tensor), expected)
    promised = operator._forward_fake(*inputs, *config, 3 if options.get("packed") else None, True)
    assert [t.stride() for t in (y, h_n, c_n)] == [t.stride() for t in promised[:3]]
    outputs, hidden = config.widths(inputs.weights)
    row_bytes = ops.saved_bytes_of_a_row(config, inputs.x, hidden, outputs)
    assert saved.numel() == row_bytes * y[..., 0].numel()
    assert bool((saved == 255).all())

    leaves = [t if t is None else t.clone().requires_grad_() for t in inputs.tensors]
    again = reference.stack(config, inputs.with_tensors(leaves))
    dy = torch.randn_like(again.y)
    there = [t for t in leaves if t is not None]
    expected = torch.autograd.grad(again.y, there, dy)
    wanted = [t is not None for t in inputs.tensors]
    with torch.no_grad():
        found = operator._backward(*inputs, *config, y, saved, dy, None, None, None, wanted)
        promised = operator._backward_fake(*inputs, *config, y, saved, dy, None, None, None, wanted)
    assert [g.stride() for g in found] == [g.stride() for g in promised]
    found = [g for g, is_wanted in zip(found, wanted, strict=True) if is_wanted]
    for g, e in zip(found, expected, strict=True):
        torch.testing.assert_close(g, e)


@pytest.mark.parametrize("cell", CELLS)
def test_torchs_operator_where_there_is_one(cell, monkeypatch):
    """Not the loop, which is a hundred times slower on a GPU."""
    config, called = StackConfig(cell), []
    loop = reference.stack
    monkeypatch.setattr(reference, "stack", lambda *a: (called.append(a), loop(*a))[1])
    in_torch.stack(config, inputs_of(config))
    assert bool(called) == (cell not in ("lstm", "gru", "rnn_tanh", "rnn_relu"))


@pytest.mark.parametrize("captured", [False, True])
def test_the_question_whether_arguments_are_valid_leaves_no_random_state(captured, off, monkeypatch):
    """The generators of the CPU and of the input's GPU are restored after torch's own layer has run."""
    forked = []
    gpu = torch.device("cuda", 1)
    monkeypatch.setattr(Pretended, "device", gpu, raising=False)

    def fork(devices):
        forked.append(devices)
        return nullcontext()

    monkeypatch.setattr(torch.random, "fork_rng", fork)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captured)
    module = rnnfast.LSTM(3, 4, coupled_gates=True)
    monkeypatch.setattr(module, "_run_torch", lambda *_: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module(on_gpu(5, 2, 3))
    module(torch.randn(5, 2, 3, requires_grad=True).expand(5, 2, 3))
    assert forked == [[] if captured else [gpu]]


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("sort", [False, True])
def test_flags_are_packed_where_they_are(sort, batch_first):
    """Batch sizes are on the CPU, the flags and the order of the rows on the GPU."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        order = torch.zeros(2, dtype=torch.int64, device="cuda") if sort else None
        sizes = torch.tensor([2, 2, 2, 1, 1])
        packed = PackedSequence(torch.zeros(8, 3, device="cuda"), sizes, order)
        flags = torch.zeros((2, 5) if batch_first else (5, 2), dtype=torch.bool, device="cuda")
        taken = sequences.take(flags, packed, batch_first)
        assert taken.shape == (8,)
        assert taken.device.type == "cuda"
