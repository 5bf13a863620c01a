"""Bitwise: threads, batch, chunks, layouts decide who computes and when, never how."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import problems
import rnnfast
from problems import Problem, forward_arrays, same_bits
from reference import CELLS
from rnnfast import _C
from seeds import seed
from threads import set_threads

numerics = pytest.mark.numerics  # of the tests that depend on the instruction set

every_cell = pytest.mark.parametrize("cell", CELLS)
every_dtype = pytest.mark.parametrize("dtype", ["float32", "float64"])

# Shared by units, by rows, or not worth sharing: the choice is the cost model's.
SHAPES = [
    (20, 1, 130, 130),
    (20, 33, 130, 130),
    (3, 300, 8, 16),
    (4, 2, 65, 257),
    (3, 7, 257, 65),
    (9, 2, 17, 3),
    (1, 1, 1, 1),
]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "T{}B{}I{}H{}".format(*s))


@numerics
@every_cell
@every_dtype
@every_shape
@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
def test_threads(cell, dtype, shape, reverse):
    """Outputs and every gradient, in arrays."""
    problem = Problem(cell, *shape, dtype, reverse=reverse)
    one = problems.by_arrays(problem, threads=1)
    for threads in (2, 3):
        set_threads(threads)
        same_bits(problems.by_arrays(problem, threads=threads), one)


@numerics
@every_cell
@every_shape
def test_threads_of_torch(cell, shape):
    """torch.set_num_threads(n) decides for modules, and arrays computes the same bits."""
    problem = Problem(cell, *shape)
    want = problems.by_arrays(problem, threads=1)
    for threads in (1, 2, 3):
        set_threads(threads)
        same_bits(problems.by_module(problem), want)


@numerics
@every_cell
def test_threads_in_stacks(cell):
    """Layers and directions may run side by side: the same bits, outputs and gradients."""
    module = getattr(rnnfast, CELLS[cell].layer)(
        17, 70, 3, bidirectional=True, **dict(CELLS[cell].options)
    )
    x, results = torch.randn(12, 9, 17, requires_grad=True), []
    for threads in (1, 2, 3):
        set_threads(threads)
        y, _ = module(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@numerics
@every_cell
@every_dtype
@pytest.mark.parametrize("size", [(3, 5), (17, 33), (130, 130)], ids=str)
def test_first_rows_of_a_batch(cell, dtype, size):
    """Every batch up to 40 is the head of the batch of 40: outputs and gradients of each row."""
    problem = Problem(cell, 3, 40, *size, dtype)
    arrays, cotangents = problem.inputs(), problem.cotangents()

    def solve(rows):
        cut = {
            name: value[..., rows, :] if name in ("x", "h0", "c0") else value
            for name, value in arrays.items()
        }
        result = forward_arrays(cell, **cut, save=True)
        grads = result.backward(**{name: d[..., rows, :] for name, d in cotangents.items()})
        pieces = {"y": result.y, "h_n": result.h_n, "d_x": grads.x, "d_h0": grads.h0}
        if CELLS[cell].has_c:
            pieces |= {"c_n": result.c_n, "d_c0": grads.c0}
        return pieces

    whole = solve(slice(None))
    counts = range(1, 40) if size[1] < 100 else (1, 2, 5, 6, 7, 16, 33)
    alone = [slice(row, row + 1) for row in (1, 7, 39)]
    for rows in [slice(0, count) for count in counts] + alone:
        same_bits(solve(rows), {name: value[..., rows, :] for name, value in whole.items()})


@numerics
@every_cell
@every_dtype
def test_other_rows_do_not_matter(cell, dtype):
    """Not even when they are NaN, infinite or huge."""
    problem = Problem(cell, 5, 9, 17, 33, dtype)
    arrays = problem.inputs()
    want = forward_arrays(cell, **arrays).y
    for poison in (np.nan, np.inf, 1e30):
        arrays["x"][2, 4] = poison
        got = forward_arrays(cell, **arrays).y
        others = np.arange(9) != 4
        assert got[:, others].tobytes() == want[:, others].tobytes()
        assert got[:2].tobytes() == want[:2].tobytes()


@numerics
@every_cell
@every_dtype
@pytest.mark.parametrize(
    "shape", [(24, 1, 17, 33), (24, 5, 130, 130), (6, 11, 35, 45), (6, 16, 64, 64)], ids=str
)
def test_whole_or_in_chunks(cell, dtype, shape):
    """Streamed in chunks of every length, states handed over."""
    arrays = Problem(cell, *shape, dtype).inputs()
    x, h, c = arrays.pop("x"), arrays.pop("h0"), arrays.pop("c0", None)
    whole = forward_arrays(cell, x, h0=h, c0=c, **arrays)
    for length in range(1, len(x)):
        h_t, c_t, y = h, c, []
        for start in range(0, len(x), length):
            part = forward_arrays(cell, x[start : start + length], h0=h_t, c0=c_t, **arrays)
            h_t, c_t = part.h_n, part.c_n
            y.append(part.y)
        assert np.concatenate(y).tobytes() == whole.y.tobytes(), length
        assert h_t.tobytes() == whole.h_n.tobytes(), length
        assert c is None or c_t.tobytes() == whole.c_n.tobytes(), length


def pair(cell, *sizes, **options):
    """A layer module, and a cell module with the same weights."""
    options = dict(CELLS[cell].options) | options
    layer = getattr(rnnfast, CELLS[cell].layer)(*sizes, **options)
    single = getattr(rnnfast, CELLS[cell].layer + "Cell")(*sizes, **options)
    single.load_state_dict({name[:-3]: value for name, value in layer.state_dict().items()})
    return layer, single


@numerics
@every_cell
@pytest.mark.parametrize("grad", [True, False])
def test_steps_of_modules(cell, grad):
    """A sequence at once, a step at a time, or a cell called at each step; with grad or without."""
    layer, single = pair(cell, 17, 130)
    x = torch.randn(12, 3, 17)
    has_c = CELLS[cell].has_c
    whole = layer(x)[0].detach()
    with torch.set_grad_enabled(grad):
        state, inner = None, None
        for t in range(len(x)):
            y, state = layer(x[t : t + 1], state)
            inner = single(x[t], inner)
            assert torch.equal(y[0], whole[t])
            assert torch.equal(inner[0] if has_c else inner, whole[t])


@numerics
@every_cell
def test_saving_changes_nothing(cell):
    """Training and inference compute the same bits."""
    for shape in SHAPES:
        arrays = Problem(cell, *shape).inputs()
        a, b = (forward_arrays(cell, **arrays, save=save) for save in (False, True))
        assert a.y.tobytes() == b.y.tobytes()
        assert a.h_n.tobytes() == b.h_n.tobytes()


@numerics
@every_cell
def test_batch_first_is_a_stride(cell):
    sizes, options = (17, 65, 2), dict(CELLS[cell].options)
    kind = getattr(rnnfast, CELLS[cell].layer)
    outputs = []
    for batch_first in (False, True):
        seed(0)
        module = kind(*sizes, bidirectional=True, batch_first=batch_first, **options)
        x = torch.randn(7, 5, 17)
        y, state = module(x.transpose(0, 1).contiguous() if batch_first else x)
        y.square().sum().backward()
        states = state if CELLS[cell].has_c else (state,)
        y = y.transpose(0, 1) if batch_first else y
        outputs.append([y, *states, *(p.grad for p in module.parameters())])
    for a, b in zip(*outputs, strict=True):
        assert torch.equal(a, b)


@numerics
@every_cell
@every_dtype
def test_layers_and_directions_are_compositions(cell, dtype):
    """Two layers, both ways, are four runs of one layer, bit by bit, whatever the schedule."""
    module = getattr(rnnfast, CELLS[cell].layer)(
        17, 33, 2, bidirectional=True, dtype=getattr(torch, dtype), **dict(CELLS[cell].options)
    )
    x = torch.randn(7, 5, 17, dtype=getattr(torch, dtype))
    y, state = module(x)
    x, h_n = x.numpy(), []
    for suffix in ("l0", "l1"):
        halves = []
        for reverse in (False, True):
            weights = [
                getattr(module, f"{name}_{suffix}" + "_reverse" * reverse).detach().numpy()
                for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            ]
            halves.append(rnnfast.arrays.forward(cell, x, weights, reverse=reverse))
            h_n.append(halves[-1].h_n)
        x = np.concatenate([half.y for half in halves], -1)
    assert y.detach().numpy().tobytes() == x.tobytes()
    h = state[0] if CELLS[cell].has_c else state
    assert h.detach().numpy().tobytes() == np.stack(h_n).tobytes()


@numerics
@every_cell
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_runs_repeat(cell, shape):
    """A race between two threads shows as a difference now and then."""
    problem = Problem(cell, *shape)
    first = problems.by_arrays(problem, threads=2)
    for _ in range(10):
        same_bits(problems.by_arrays(problem, threads=2), first)


@numerics
@every_cell
def test_calls_from_several_threads(cell):
    """The GIL is released: calls at the same time must share no scratch memory."""
    shapes = [(20, 1, 130, 130), (6, 33, 65, 130), (9, 2, 17, 3), (30, 4, 33, 65)]
    work = [Problem(cell, *shape, seed=seed) for shape in shapes for seed in range(4)]
    want = [problems.by_arrays(problem, threads=1) for problem in work]
    for threads in (1, 2):
        with ThreadPoolExecutor(4) as pool:
            got = list(pool.map(lambda p, n=threads: problems.by_arrays(p, threads=n), work))
        for a, b in zip(got, want, strict=True):
            same_bits(a, b)


@numerics
@every_cell
@every_dtype
@pytest.mark.parametrize("threads", [1, 2])
def test_flush_mode_of_the_caller(cell, dtype, threads):
    """States that decay through the denormals: the same bits, whatever the caller has set."""
    problem = Problem(cell, 60, 33, 5, 130, dtype)
    arrays = problem.inputs()
    arrays["x"][2:] = 0
    arrays |= {name: arrays[name] * 1e-3 for name in arrays if name[0] in "wbc"}
    arrays |= {"h0": arrays["h0"] * (1e-36 if dtype == "float32" else 1e-306)}
    results = []
    for flush in (False, True):
        if not torch.set_flush_denormal(flush):
            pytest.skip("this processor cannot flush denormals")
        result = forward_arrays(cell, **arrays, save=True, threads=threads)
        grads = result.backward(result.y)
        results.append([result.y, *(getattr(grads, name) for name in arrays)])
    for a, b in zip(*results, strict=True):
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("flush", [False, True])
def test_sums_of_directions_flush_denormals(flush):
    """The gradient of x is a sum over the directions, here of two numbers whose sum is a denormal."""
    module = rnnfast.RNN(1, 1, nonlinearity="relu", bidirectional=True, bias=False)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            weight.fill_(1 if "ih" in name else 0)
    torch.set_num_threads(2)
    torch.set_flush_denormal(flush)
    for partition in ("one", "directions"):
        _C.force_partition(partition, oversubscribe=True)
        x = torch.ones(4, 1, 1, requires_grad=True)
        y, _ = module(x)
        y.backward(torch.tensor([1.5e-38, -1.3e-38]).expand(4, 1, 2))
        assert _C.used_partition() == (partition, 1 if partition == "one" else 2)
        assert x.grad is not None
        assert x.grad.tolist() == torch.zeros(4, 1, 1).tolist()
