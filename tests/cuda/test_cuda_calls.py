"""Modules on a GPU where no CUDA kernel runs: what a call costs, and what the user is told."""

from __future__ import annotations

import warnings

import pytest
import torch

import rnnfast
from rnnfast.stack import cuda_plans, cuda_switch


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
CELLS = [rnnfast.LSTMCell(3, 4), rnnfast.GRUCell(3, 4), rnnfast.RNNCell(3, 4)]


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("module", LAYERS + CELLS, ids=lambda m: type(m).__name__)
def test_torch_computes_at_once(module, grad, off, monkeypatch):
    """The module asks where the input is, and nothing else."""
    torchs = next(c for c in type(module).__mro__ if c.__module__.startswith("torch.nn"))
    monkeypatch.setattr(torchs, "forward", lambda self, input, hx: (self, input, hx))
    given = OnGpu()
    with torch.set_grad_enabled(grad):
        assert module(given, 7) == (module, given, 7)


@pytest.mark.parametrize("module", CELLS, ids=lambda m: type(m).__name__)
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
