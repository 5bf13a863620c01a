"""A module of rnnfast and the one of torch.nn with the same weights, and how to compare them."""

from __future__ import annotations

import warnings
from functools import cache

import pytest
import torch

import rnnfast
from reference import CELLS
from seeds import seed

LAYERS = [name for name, cell in CELLS.items() if cell.in_torch]

# What a compiler or an exporter makes of a cell depends on its entry in the table alone. So `make test`
# compiles one cell of each class, and `.ci/run` all of them.
OF_EACH_CLASS = [
    pytest.param(name, marks=() if name in ("rnn_tanh", "lstm", "gru") else pytest.mark.slow)
    for name in CELLS
]

# torch.nn itself differs from the float64 truth by about as much
CLOSE = {
    torch.float32: {"rtol": 1e-5, "atol": 2e-6},
    torch.float64: {"rtol": 1e-11, "atol": 1e-12},
}


def make(package, cell, *sizes, suffix="", **options):
    """A module of `package`, from seed 0."""
    seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dropout with one layer
        kind = getattr(package, CELLS[cell].layer + suffix)
        return kind(*sizes, **dict(CELLS[cell].options), **options)


def twins(cell, *sizes, **options):
    return make(rnnfast, cell, *sizes, **options), make(torch.nn, cell, *sizes, **options)


@cache
def torch_has_half_lstm():
    """Whether oneDNN, through which torch runs it, has an LSTM in bfloat16: it needs AVX-512."""
    with torch.autocast("cpu", torch.bfloat16):
        try:
            torch.nn.LSTM(5, 7)(torch.randn(4, 3, 5))
        except RuntimeError as error:
            if "could not create a primitive descriptor" not in str(error):
                raise
            return False
    return True


def flatten(out):
    """All the tensors of a module's output, in order."""
    return (out,) if torch.is_tensor(out) else tuple(o for part in out for o in flatten(part))


def states(cell, *shape, dtype=torch.float32):
    """A state as the module takes it."""
    h, c = torch.randn(2, *shape, dtype=dtype)
    return (h, c) if CELLS[cell].has_c else h


def gradients(module, loss):
    return torch.autograd.grad(loss, list(module.parameters()))


def assert_twins_agree(ours, theirs, *args):
    """The same outputs, of the same shape, dtype and strides' order, and the same gradients."""
    seed(1)
    got = flatten(ours(*args))
    seed(1)
    want = flatten(theirs(*args))
    assert len(got) == len(want)
    weights = [torch.randn(w.shape).to(w) for w in want]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **CLOSE[b.dtype])
    pairs = zip((got, want), (ours, theirs), strict=True)
    (a, b) = (
        gradients(module, sum((o * w).sum() for o, w in zip(out, weights, strict=True)))
        for out, module in pairs
    )
    for got, want in zip(a, b, strict=True):
        torch.testing.assert_close(got, want, **CLOSE[want.dtype])


def raised(function):
    """The exception's type and message, or None."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            function()
        except Exception as error:
            return type(error), str(error)
    return None
