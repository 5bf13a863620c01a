"""Values at the edge: NaN, infinities, the huge, the tiny, and the floating-point environment."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import problems
import rnnfast
import tolerances
from problems import Problem, forward_arrays
from reference import CELLS
from twins import LAYERS, flatten, make, states, twins

numerics = pytest.mark.numerics  # of the tests that depend on the instruction set

every_layer = pytest.mark.parametrize("cell", LAYERS)
every_cell = pytest.mark.parametrize("cell", CELLS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


@numerics
@every_layer
@every_dtype
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 1e4, -1e4, 1e30])
@pytest.mark.parametrize("where", ["x", "h0", "bias"])
def test_propagates_as_torchs(cell, dtype, poison, where):
    """Sizes with a tail, so that vectors and the rest are both tried."""
    ours, theirs = twins(cell, 5, 19, dtype=dtype)
    x, hx = torch.randn(4, 3, 5, dtype=dtype), states(cell, 1, 3, 19, dtype=dtype)
    if where == "x":
        x[1, 1, 2] = poison
    elif where == "h0":
        flatten(hx)[-1][0, 1, 18] = poison
    else:
        for module in (ours, theirs):
            with torch.no_grad():
                module.bias_ih_l0[-1] = poison
    for a, b in zip(flatten(ours(x, hx)), flatten(theirs(x, hx)), strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        # a ReLU takes the large values to the next step, where they cancel
        finite = b[b.isfinite()].abs()
        scale = max(1.0, finite.max().item()) if len(finite) else 1.0
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6 * scale, equal_nan=True)


@numerics
@every_layer
@every_dtype
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 1e4, 1e30])
@pytest.mark.parametrize("of", ["finite outputs", "all outputs"])
def test_gradients_propagate_as_torchs(cell, dtype, poison, of):
    """Where torch's are finite, ours are: an infinity must not spread through the padding."""
    ours, theirs = twins(cell, 5, 19, dtype=dtype)
    x, weight = torch.randn(4, 3, 5, dtype=dtype), torch.randn(4, 3, 19, dtype=dtype)
    x[1, 1, 2] = poison
    results = []
    for module in (ours, theirs):
        leaves = [x.clone().requires_grad_(), *module.parameters()]
        y, _ = module(leaves[0])
        grad = torch.where(y.isfinite(), weight, 0) if of == "finite outputs" else weight
        results.append(torch.autograd.grad(y, leaves, grad))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())
        a, b = a[a.isfinite()], b[b.isfinite()]
        scale = max(1.0, b.abs().max().item()) if len(b) else 1.0
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6 * scale)


@numerics
@every_cell
@every_dtype
@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_saturates_without_nan(cell, dtype, scale):
    """Every gate at its end: finite outputs, and gradients that are finite too."""
    if cell == "rnn_relu":
        pytest.skip("does not saturate: its states grow without bound, in torch.nn as well")
    module = make(rnnfast, cell, 5, 19, dtype=dtype)
    x = (scale * torch.randn(6, 3, 5, dtype=dtype)).requires_grad_()
    y, _ = module(x)
    assert y.isfinite().all()
    assert y.abs().max() <= 1
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.isfinite().all()


@numerics
@every_cell
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_functions_over_their_whole_range(cell, dtype):
    """One input, one unit, identity weights: the activations themselves, from -120 to 120.

    Relative to the value: a tanh that loses its small arguments to cancellation would pass
    a test of absolute errors.
    """
    gates = CELLS[cell].gates
    points = np.concatenate([np.linspace(-120, 120, 4801), np.geomspace(1e-30, 1, 301)])
    x = np.concatenate([points, -points]).astype(dtype).reshape(1, -1, 1)
    w_ih, w_hh = np.ones((gates, 1), dtype), np.zeros((gates, 1), dtype)
    got = rnnfast.arrays.forward(cell, x, (w_ih, w_hh)).y.astype(np.longdouble)
    wide = x.astype(np.longdouble)
    s, t = 1 / (1 + np.exp(-wide)), np.tanh(wide)
    want = {
        "rnn_tanh": t,
        "rnn_relu": np.maximum(wide, 0),
        "lstm": s * np.tanh(s * t),
        "lstm_coupled": s * np.tanh((1 - s) * t),
        "gru": (1 - s) * t,
        "gru_original": (1 - s) * t,
    }[cell]
    eps, tiny = np.finfo(dtype).eps, np.finfo(dtype).tiny
    # where a gate z is near 1, what is left of 1 - z is exact to eps of 1
    slack = np.where((wide > 1) & (cell in ("gru", "gru_original", "lstm_coupled")), 2 * eps, 2 * tiny)
    assert (np.abs(got - want) <= tolerances.ACTIVATION[cell] * eps * np.abs(want) + slack).all()


def tanh_of(numbers):
    """By an RNN that has the identity for weights: every sum is one number and zeros."""
    width = 16
    x = numbers.reshape(1, -1, width)
    w_ih = np.eye(width, dtype=x.dtype)
    return rnnfast.arrays.forward("rnn_tanh", x, (w_ih, np.zeros_like(w_ih))).y.reshape(-1)


@numerics
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_tanh_to_the_last_place(dtype):
    """From the tiny to the saturated: in float32 every 61st number, in float64 random ones."""
    if dtype == "float32":
        least, most = np.array([2.0**-30, 10], dtype).view(np.int32)
        numbers = np.arange(least, most, 61, dtype=np.int32).view(dtype)
        wide = np.float64
    else:
        rng, size = np.random.default_rng(0), 1 << 20
        small, large = 2.0 ** rng.uniform(-60, 1, size), rng.uniform(0, 22, size)
        numbers = np.concatenate([small, rng.uniform(0.5, 1.1, size), large])
        wide = np.longdouble
    numbers = numbers[: len(numbers) // 16 * 16]
    for sign in (1, -1):
        x = (sign * numbers).astype(dtype)
        assert tolerances.last_places(tanh_of(x), np.tanh(x.astype(wide))) <= tolerances.TANH


@numerics
def test_gradients_through_saturated_units():
    """A row's gradient has 1 - tanh^2 for a factor, which is all that tanh's last places leave."""
    ours, theirs = twins("rnn_tanh", 33, 1)
    inputs, weight = 8 * torch.randn(2, 4096, 33), torch.randn(2, 4096, 1)

    def gradients(module, dtype):
        x = inputs.to(dtype).requires_grad_()
        y, _ = module.to(dtype)(x)
        (dx,) = torch.autograd.grad((y * weight.to(dtype)).sum(), x)
        return dx.double(), 1 - y.detach().double() ** 2

    got, want = (gradients(module, torch.float32)[0] for module in (ours, theirs))
    true, slope = gradients(theirs, torch.float64)
    saturated = ((slope > 1e-4) & (slope < 1e-2)).squeeze(2)
    assert saturated.sum() > 100
    error, torchs = (((d - true).norm(dim=2) / true.norm(dim=2))[saturated] for d in (got, want))
    assert error.max() <= tolerances.SATURATED * torchs.max()
    assert error.square().mean().sqrt() <= tolerances.SATURATED * torchs.square().mean().sqrt()


@numerics
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_tanh_of_special_values(dtype):
    """One unit a row: no NaN of a row reaches another."""
    info = np.finfo(dtype)
    ends = [np.inf, info.max, 1e3, 88.7, 44.4, 25]
    x = np.array([0, info.tiny / 8, *ends, np.nan] * 3, dtype)
    want = np.array([0, 0, *np.ones(len(ends)), np.nan] * 3, dtype)
    one = np.ones((1, 1), dtype)
    for sign in (1, -1):
        y = rnnfast.arrays.forward("rnn_tanh", sign * x.reshape(1, -1, 1), (one, 0 * one)).y
        np.testing.assert_array_equal(y.reshape(-1), sign * want)


@numerics
@every_cell
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_denormal_inputs(cell, dtype):
    problem = Problem(cell, 4, 3, 5, 19, dtype)
    arrays = problem.inputs()
    tiny = np.finfo(dtype).tiny
    zeroed = arrays | {"x": np.zeros_like(arrays["x"])}
    small = arrays | {"x": np.full_like(arrays["x"], tiny / 8)}
    got, want = (forward_arrays(cell, **a).y for a in (small, zeroed))
    assert np.abs(got.astype(np.float64) - want).max() <= np.finfo(dtype).eps


def flushes():
    """Whether this thread's arithmetic flushes denormals, and whether torch's pool does."""
    tiny = float("5e-324")
    many = torch.full((1 << 20,), 1e-40)
    return tiny * float("1.0") == 0.0, bool(((many * 1.0) == 0).any())


@numerics
@every_cell
@pytest.mark.parametrize("threads", [1, 2])
def test_environment_of_the_caller_is_unchanged(cell, threads):
    """Neither the calling thread nor the shared OpenMP pool may be left flushing denormals."""
    torch.set_num_threads(threads)
    module = make(rnnfast, cell, 130, 130)
    x = torch.randn(20, 33, 130)
    assert flushes() == (False, False)
    module(x)[0].sum().backward()
    assert flushes() == (False, False)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    module(x)[0].sum().backward()
    assert flushes()[0]


@pytest.fixture
def far_apart(tmp_path):
    """Copies arrays into a sparse file, the rows of their first dimension 2^31 elements apart."""
    files = []

    def spread(a):
        step = 2**31 + 7
        path = tmp_path / str(len(files))
        size = (len(a) - 1) * step + a[0].size
        memory = np.memmap(path, a.dtype, "w+", shape=(size,))
        files.append(path)
        strides = (step * a.itemsize, *a[0].strides)
        view = np.lib.stride_tricks.as_strided(memory, a.shape, strides)
        view[...] = a
        return view

    yield spread
    for path in files:
        path.unlink()


@numerics
@every_cell
@pytest.mark.parametrize("name", ["x", "h0", "w_ih", "w_hh"])
def test_beyond_two_to_the_31(cell, name, far_apart):
    """No index may be computed in 32 bits."""
    problem = Problem(cell, 3, 2, 5, 2 if name.startswith("w") else 19)
    arrays, cotangents = problem.inputs(), problem.cotangents()
    cotangents["dy"] = far_apart(cotangents["dy"])
    want = problems.by_arrays(problem)
    arrays[name] = far_apart(arrays[name])
    result = forward_arrays(cell, **arrays, save=True)
    grads = result.backward(**cotangents)
    assert result.y.tobytes() == want["y"].tobytes()
    for other in arrays:
        assert getattr(grads, other).tobytes() == want[f"d_{other}"].tobytes(), other
