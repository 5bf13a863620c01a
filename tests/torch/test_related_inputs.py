"""Gradients where one input depends on another, and calls that are hostile or odd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import rnnfast
from reference import CELLS
from rnnfast import _C
from seeds import seed
from twins import LAYERS, twins

every_layer = pytest.mark.parametrize("cell", LAYERS)


def states(cell, *h):
    return tuple(h) if CELLS[cell].has_c else h[0]


def answers(module, cell, problem, graph):
    seed(0)
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    h = torch.randn(1, 2, 4, dtype=torch.float64, requires_grad=True)
    if problem == "the same state twice":
        y = module(x, states(cell, h, h))[0]
    elif problem == "a state made of the input":
        y = module(x, states(cell, x[:1] * 2, x[:1].sin()))[0]
    else:  # a module fed its own output
        y = module(module(x, states(cell, h, h))[0])[0]
    inputs = [x, h, *module.parameters()]
    grads = torch.autograd.grad(y.sin().sum(), inputs, create_graph=graph, allow_unused=True)
    if graph:
        total = sum(g.square().sum() for g in grads if g is not None)
        grads = (*grads, *torch.autograd.grad(total, inputs, allow_unused=True))
    return [g for g in grads if g is not None]


@every_layer
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize(
    "problem", ["the same state twice", "a state made of the input", "fed its own output"]
)
def test_inputs_that_depend_on_each_other(cell, problem, graph):
    ours, theirs = twins(cell, 4, 4, dtype=torch.float64)
    got, want = (answers(m, cell, problem, graph) for m in (ours, theirs))
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@every_layer
@pytest.mark.parametrize("batch_first", [False, True])
def test_output_changed_in_place(cell, batch_first):
    ours, theirs = twins(cell, 4, 6, dtype=torch.float64, batch_first=batch_first)
    grads = []
    for module in (ours, theirs):
        x = torch.ones(3, 2, 4, dtype=torch.float64, requires_grad=True)
        y = module(x)[0]
        y.mul_(2)
        y[:, 0] = 0
        grads.append(torch.autograd.grad(y.sum(), [x, *module.parameters()]))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@every_layer
def test_strided_weights_without_gradients(cell):
    ours, theirs = twins(cell, 3, 4)
    for module in (ours, theirs):
        strided = module.weight_hh_l0.detach().t().contiguous().t()
        module.weight_hh_l0 = nn.Parameter(strided)
    x = torch.randn(2, 2, 3)
    with torch.no_grad():
        torch.testing.assert_close(ours(x)[0], theirs(x)[0])


def test_one_state_of_two():
    x = torch.ones(2, 2, 3)
    for suffix, h in (("", torch.ones(1, 2, 4)), ("Cell", torch.ones(2, 4))):
        for package in (nn, rnnfast):
            module = getattr(package, "LSTM" + suffix)(3, 4)
            with torch.no_grad(), pytest.raises((AttributeError, TypeError)):
                module(x if not suffix else x[0], (h, None))


def test_gradients_enabled_in_inference_mode():
    with torch.inference_mode(), torch.enable_grad():
        assert rnnfast.LSTM(3, 4)(torch.ones(2, 2, 3))[0].shape == (2, 2, 4)


def test_an_endless_empty_batch_takes_no_time():
    y, _ = rnnfast.GRU(3, 4)(torch.empty(2**33, 0, 3))
    assert y.shape == (2**33, 0, 4)


def call(cell=2, batch_sizes=None, x=None, y=None, **shape):
    """One layer through the extension itself: an LSTM, unless `cell` says otherwise."""
    stack = _C.Stack(cell=cell, **({"bias": False} | shape))
    weights = [np.zeros((20, 4)), np.zeros((20, 5))]
    x = np.zeros((3, 2, 4)) if x is None else x
    y = np.full((3, 2, 5), np.nan) if y is None else y
    inputs, outputs = (x, None, None, weights, batch_sizes, None), (y, None, None, None, None)
    stack.forward(1, inputs, outputs)
    return y


@pytest.mark.parametrize("cell", [-1, len(_C.cells()), 99, 2**31 - 1])
def test_cells_that_are_not_there(cell):
    assert not call().any()
    with pytest.raises(ValueError, match="cell"):
        call(cell)


SHAPES = [{"layers": 0}, {"layers": -1}, {"directions": 0}, {"directions": 3}, {"layers": 2**30}]


@pytest.mark.parametrize(
    "shape", [*SHAPES, {"directions": 2, "reverse": True}, {"layers": 2, "single": True}], ids=str
)
def test_stacks_that_cannot_be(shape):
    with pytest.raises(ValueError, match=r"layers|directions"):
        call(**shape)


@pytest.mark.parametrize("shape", [{"layers": 2}, {"directions": 2}, {"bias": True}], ids=str)
def test_weights_that_are_too_few(shape):
    with pytest.raises(ValueError, match=r"has \d weights; got 2"):
        call(**shape)


def test_more_threads_than_there_can_be():
    w_ih, w_hh = np.ones((512, 64), "f") / 64, np.ones((512, 128), "f") / 128
    x = np.ones((5, 200, 64), "f")
    many, one = (
        rnnfast.arrays.forward("lstm", x, (w_ih, w_hh), threads=threads).y for threads in (10**6, 1)
    )
    assert (many == one).all()


@pytest.mark.parametrize("sizes", [[2**62] * 4, [2, 3], [2, 0], [-1], []])
def test_batch_sizes_that_make_no_sense(sizes):
    with pytest.raises(ValueError, match="batch_sizes"):
        call(2, np.array(sizes, np.int64), np.empty((0, 4)), np.empty((0, 5)))


def test_items_without_size():
    with pytest.raises((ValueError, TypeError)):
        call(x=np.zeros((3, 2, 4), np.dtype([])))


@pytest.mark.parametrize("types", [5, "ab", [torch.Tensor]], ids=str)
def test_types_that_are_no_tuple(types):
    stack = _C.Stack(cell=2, bias=False)
    x, weights = torch.zeros(3, 2, 4), [torch.zeros(20, 4), torch.zeros(20, 5)]
    arguments = (1, (x, None, None, weights, None, None), None, None)
    y, h_n, c_n, *others = stack.call((torch.Tensor,), *arguments)
    assert (y.shape, h_n.shape, c_n.shape) == ((3, 2, 5), (1, 2, 5), (1, 2, 5))
    assert others == [None, None]
    with pytest.raises(TypeError, match="incompatible"):
        stack.call(types, *arguments)


def test_an_interrupt_in_a_mode_is_not_lost():
    """Tensors may run Python when they are looked at, and a signal's exception comes up there."""

    class Interrupted(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.Tensor.is_neg:
                raise KeyboardInterrupt
            return func(*args, **(kwargs or {}))

    module, x = rnnfast.GRU(3, 4), torch.zeros(2, 1, 3)
    with Interrupted(), pytest.raises(KeyboardInterrupt):
        module(x)


def test_an_empty_batch_on_another_default_device():
    module, x = rnnfast.LSTM(5, 7), torch.zeros(3, 0, 5)
    with torch.device("meta"):
        y, _ = module(x)
    y.sum().backward()
    assert y.shape == (3, 0, 7)
    assert not module.weight_hh_l0.grad.any()
