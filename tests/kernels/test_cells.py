"""Every cell, forward and every gradient, against its formula in float64 and torch.nn's error."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import problems
import rnnfast
import tolerances
from problems import Problem, forward_arrays
from reference import CELLS
from rnnfast import _C
from rnnfast.stack import cell_table, formulas
from seeds import seed

numerics = pytest.mark.numerics  # of the tests that depend on the instruction set

DTYPES = ["float32", "float64"]

# (T, B, I, H): no multiples of a vector, one of each, no rows, blocks of rows and their tails
SHAPES = [
    (1, 1, 1, 1),
    (5, 1, 3, 17),
    (1, 3, 17, 3),
    (7, 2, 65, 17),
    (4, 5, 1, 65),
    (3, 7, 257, 65),
    (6, 1, 65, 257),
    (2, 4, 257, 257),
    (1, 1, 257, 257),
    (9, 33, 17, 65),
    (3, 70, 65, 3),
    (20, 6, 32, 64),
    (100, 2, 3, 17),
    (30, 40, 9, 70),
    (8, 257, 5, 1),  # with I=3 the 2056 terms of one gradient nearly cancel: its error is luck
    (4, 0, 3, 17),
    (1, 0, 1, 1),
]

every_cell = pytest.mark.parametrize("cell", CELLS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "T{}B{}I{}H{}".format(*s))


def test_every_cell_has_a_reference():
    assert set(rnnfast.arrays.CELLS) == set(CELLS)
    assert set(formulas.FORMULAS) == set(CELLS)


@every_cell
def test_the_table_is_what_the_reference_says(cell):
    row, reference = cell_table.CELLS[cell], CELLS[cell]
    assert (row.name, row.weight_blocks, row.has_c) == (cell, reference.gates, reference.has_c)
    assert row.onnx.op == reference.layer
    assert _C.cells()[row.number]["name"] == cell


@numerics
@every_cell
@every_dtype
@every_shape
@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
def test_arrays(cell, dtype, shape, reverse):
    problem = Problem(cell, *shape, dtype, reverse=reverse)
    problems.check(problems.by_arrays(problem), problem)


@numerics
@every_cell
@every_dtype
@every_shape
def test_layer_module(cell, dtype, shape):
    problem = Problem(cell, *shape, dtype)
    problems.check(problems.by_module(problem), problem)


@numerics
@every_cell
@every_dtype
@every_shape
def test_cell_module(cell, dtype, shape):
    problem = Problem(cell, min(shape[0], 9), *shape[1:], dtype)
    problems.check(problems.by_cell_module(problem), problem)


@numerics
@every_cell
@pytest.mark.parametrize("shape", [(1500, 1, 1, 33), (70, 40, 3, 70)], ids=str)
def test_long_sequences(cell, shape):
    """Longer than what a kernel takes at a time, with one row and with many; saved or not."""
    problem = Problem(cell, *shape)
    solution = problems.by_arrays(problem)
    problems.check(solution, problem)
    for reverse in (False, True):
        twin = Problem(cell, *shape, reverse=reverse)
        unsaved = forward_arrays(cell, **twin.inputs(), reverse=reverse)
        assert unsaved.y.tobytes() == problems.by_arrays(twin)["y"].tobytes()


@numerics
@every_cell
@pytest.mark.parametrize("shape", [(20, 32, 64, 64), (9, 33, 17, 65), (10, 16, 257, 257)])
def test_typical_error_is_near_torchs(cell, shape):
    problem = Problem(cell, *shape)
    solution, true, peer = (
        problems.by_arrays(problem),
        problems.truth(problem),
        problems.peer(problem),
    )
    wrong = []
    for name, value in true.items():
        error, torchs = (tolerances.rms(of[name], value) for of in (solution, peer))
        if not error <= tolerances.PEER_FACTOR * torchs:
            wrong.append(f"{name}: {error / torchs:.2f} times torch's")
    assert not wrong, "; ".join(wrong)


@numerics
@every_cell
@every_dtype
@pytest.mark.parametrize("solve", [problems.by_arrays, problems.by_module, problems.by_cell_module])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (5, 3, 17, 65), (2, 33, 65, 17)])
def test_without_bias(cell, dtype, solve, shape):
    problem = Problem(cell, *shape, dtype, bias=False)
    problems.check(solve(problem), problem)


@numerics
@every_cell
@every_dtype
def test_one_bias_only(cell, dtype):
    """b_ih without b_hh is b_hh = 0: no bias may be added twice, or read where there is none."""
    problem = Problem(cell, 4, 3, 5, 17, dtype)
    arrays = problem.inputs()
    for absent in ("b_ih", "b_hh"):
        zeroed = arrays | {absent: np.zeros_like(arrays[absent])}
        without = {name: value for name, value in arrays.items() if name != absent}
        want = forward_arrays(cell, **zeroed)
        got = forward_arrays(cell, **without)
        np.testing.assert_array_equal(got.y, want.y)


@numerics
@every_cell
@every_dtype
def test_states_default_to_zero(cell, dtype):
    problem = Problem(cell, 4, 3, 5, 17, dtype)
    arrays, cotangents = problem.inputs(), problem.cotangents()
    zeroed = arrays | {name: 0 * arrays[name] for name in ("h0", "c0") if name in arrays}
    without = {name: value for name, value in arrays.items() if name not in ("h0", "c0")}
    want = forward_arrays(cell, **zeroed, save=True)
    got = forward_arrays(cell, **without, save=True)
    np.testing.assert_array_equal(got.y, want.y)
    want, got = want.backward(**cotangents), got.backward(**cotangents)
    for name in ("x", "w_ih", "w_hh", "b_ih", "b_hh"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)


@numerics
@every_cell
def test_absent_cotangents_are_zero(cell):
    problem = Problem(cell, 4, 3, 5, 17, "float64")
    result = forward_arrays(cell, **problem.inputs(), save=True)
    cotangents = problem.cotangents()
    for kept in cotangents:
        zeroed = {name: value * (name == kept) for name, value in cotangents.items()}
        got, want = result.backward(**{kept: cotangents[kept]}), result.backward(**zeroed)
        for name in problem.inputs():
            np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)
    nothing = result.backward()
    assert all(not getattr(nothing, name).any() for name in problem.inputs())


@numerics
@every_cell
def test_final_states(cell):
    """h_n is the last output in the order of time, the first when reversed; c_n only in LSTM."""
    problem = Problem(cell, 6, 3, 5, 17)
    for reverse, last in ((False, -1), (True, 0)):
        result = forward_arrays(cell, **problem.inputs(), reverse=reverse)
        np.testing.assert_array_equal(result.h_n, result.y[last])
        assert (result.c_n is not None) == CELLS[cell].has_c


def misaligned(a):
    """The same values one byte off every alignment, as a field of a packed record."""
    record = np.zeros(a.size, [("pad", "u1"), ("value", a.dtype)])
    record["value"] = a.ravel()
    return record["value"].reshape(a.shape)


def off_by_a_byte(a):
    """Contiguous, and one byte off every alignment."""
    memory = np.zeros(a.nbytes + 1, np.uint8)
    moved = memory[1:].view(a.dtype).reshape(a.shape)
    moved[...] = a
    return moved


def swapped_bytes(a):
    return a.astype(a.dtype.newbyteorder())


def in_larger(a):
    """A window in a larger array of NaN: one element beside it, read, would show."""
    larger = np.full([2 * n + 3 for n in a.shape], np.nan, a.dtype)
    window = larger[tuple(slice(1, 1 + 2 * n, 2) for n in a.shape)]
    window[...] = a
    return window


ARRAY_LAYOUTS = {
    "fortran": np.asfortranarray,
    "negative": lambda a: np.ascontiguousarray(a[..., ::-1])[..., ::-1],
    "reversed": lambda a: np.ascontiguousarray(a[::-1])[::-1],
    "in_larger": in_larger,
    "misaligned": misaligned,
    "off_by_a_byte": off_by_a_byte,
    "swapped_bytes": swapped_bytes,
    "swapped_bytes_off_by_one": lambda a: off_by_a_byte(swapped_bytes(a)),
    "swapped_bytes_in_records": lambda a: misaligned(swapped_bytes(a)),
    "swapped_bytes_fortran": lambda a: np.asfortranarray(swapped_bytes(a)),
    "swapped": lambda a: np.ascontiguousarray(np.swapaxes(a, 0, -1)).swapaxes(0, -1),
}


@every_cell
@every_dtype
@pytest.mark.parametrize("layout", ARRAY_LAYOUTS)
def test_array_layouts(cell, dtype, layout):
    problem = Problem(cell, 4, 3, 17, 18, dtype)
    got = problems.by_arrays(problem, layout=ARRAY_LAYOUTS[layout])
    assert all(a.dtype == dtype and a.flags.carray for a in got.values())
    problems.same_bits(got, problems.by_arrays(problem))


@every_dtype
@pytest.mark.parametrize("layout", ARRAY_LAYOUTS)
@pytest.mark.parametrize("batch", [0, 3])
def test_array_layouts_of_other_arguments(dtype, layout, batch):
    """A projection and resets; and arrays without elements."""
    problem = Problem("lstm", 4, batch, 17, 18, dtype, R=5)
    reset = np.random.default_rng(0).random((4, batch)) < 0.5
    solutions = []
    for change in (ARRAY_LAYOUTS[layout], lambda a: a):
        arrays = {name: change(a) for name, a in (problem.inputs() | {"reset": reset}).items()}
        result = forward_arrays("lstm", **arrays, save=True)
        grads = result.backward(**{name: change(a) for name, a in problem.cotangents().items()})
        solutions.append({"y": result.y, "c_n": result.c_n} | grads._asdict())
    problems.same_bits(*solutions)


@every_cell
@every_dtype
def test_broadcast_read_only_arrays(cell, dtype):
    """Strides of zero, and no permission to write."""
    arrays = Problem(cell, 4, 3, 17, 18, dtype).inputs()
    for name in ("x", "h0", "c0"):
        if name in arrays:
            row = arrays[name][..., :1, :]
            arrays[name] = np.broadcast_to(row, arrays[name].shape)
    dense = {name: value.copy() for name, value in arrays.items()}
    dy = np.broadcast_to(np.ones((), dtype), (4, 3, 18))
    got, want = (forward_arrays(cell, **a, save=True) for a in (arrays, dense))
    np.testing.assert_array_equal(got.y, want.y)
    got, want = got.backward(dy), want.backward(dy.copy())
    for name in arrays:
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)


@every_cell
def test_inputs_and_earlier_results_stay(cell):
    """Nothing is written to what the caller gave, or to what an earlier call returned."""
    problem, other = Problem(cell, 5, 3, 17, 18), Problem(cell, 5, 3, 17, 18, seed=1)
    arrays, cotangents = problem.inputs(), problem.cotangents()
    result = forward_arrays(cell, **arrays, save=True)
    y, h_n = result.y.copy(), result.h_n.copy()
    problems.by_arrays(other)
    first = result.backward(**cotangents)
    kept = {name: getattr(first, name).copy() for name in arrays}
    problems.by_arrays(other)
    second = result.backward(**cotangents)
    np.testing.assert_array_equal(result.y, y)
    np.testing.assert_array_equal(result.h_n, h_n)
    for name, value in problem.inputs().items():
        np.testing.assert_array_equal(arrays[name], value, err_msg=name)
        np.testing.assert_array_equal(getattr(first, name), kept[name], err_msg=name)
        np.testing.assert_array_equal(getattr(second, name), kept[name], err_msg=name)
    for name, value in problem.cotangents().items():
        np.testing.assert_array_equal(cotangents[name], value, err_msg=name)


@every_cell
def test_outputs_are_separate(cell):
    """Writing to the final state must not reach y: callers reset states in place."""
    module = getattr(rnnfast, CELLS[cell].layer)(5, 17, **dict(CELLS[cell].options))
    for length in (1, 4):
        x, hx = torch.randn(length, 3, 5), torch.zeros(1, 3, 17)
        with torch.no_grad():
            y, state = module(x, (hx, hx.clone()) if CELLS[cell].has_c else hx)
            before = y.clone()
            for h in state if CELLS[cell].has_c else (state,):
                h.fill_(7.0)
        assert torch.equal(y, before)
        assert not hx.any()


TENSOR_LAYOUTS = {
    "batch_first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "features_first": lambda x: x.movedim(2, 0).contiguous().movedim(0, 2),
    "last_strided": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0],
    "sliced": lambda x: torch.cat([x, x.detach() + torch.nan], 2)[..., : x.shape[2]],
    "offset": lambda x: torch.cat([x.detach().flatten()[:1], x.flatten()])[1:].view(x.shape),
}


@numerics
@every_cell
@every_dtype
@pytest.mark.parametrize("layout", TENSOR_LAYOUTS)
def test_tensor_layouts(cell, dtype, layout):
    problem = Problem(cell, 4, 3, 17, 18, dtype)
    got = problems.by_module(problem, layout=TENSOR_LAYOUTS[layout])
    problems.same_bits(got, problems.by_module(problem))


@numerics
@every_cell
@every_dtype
def test_expanded_tensors(cell, dtype):
    """One row for all the batch and one state for all rows: gradients add up in the one."""
    options, has_c = dict(CELLS[cell].options), CELLS[cell].has_c
    module = getattr(rnnfast, CELLS[cell].layer)(17, 18, dtype=getattr(torch, dtype), **options)
    x = torch.randn(4, 1, 17, dtype=getattr(torch, dtype), requires_grad=True)
    h = torch.randn(1, 1, 18, dtype=getattr(torch, dtype), requires_grad=True)
    grads = []
    for make in (lambda a: a.expand(-1, 3, -1), lambda a: a.repeat(1, 3, 1)):
        y, _ = module(make(x), (make(h), make(h)) if has_c else make(h))
        grads.append(torch.autograd.grad(y.sum(), [x, h, *module.parameters()]))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


GRADIENT_LAYOUTS = {
    "expanded": lambda y: y.sum().backward(),
    "expanded_rows": lambda y: (y.sum(1) ** 2).sum().backward(),
    "transposed": lambda y: y.backward(torch.randn(*y.shape[::-1]).permute(2, 1, 0)),
    "last_strided": lambda y: y.backward(torch.randn(*y.shape, 2)[..., 1]),
    "last_step": lambda y: y[-1].sum().backward(),
}


@numerics
@every_cell
@pytest.mark.parametrize("layout", GRADIENT_LAYOUTS)
def test_gradient_layouts(cell, layout):
    """What arrives as grad_output is seldom contiguous; a hook makes it so for comparison."""
    module = getattr(rnnfast, CELLS[cell].layer)(17, 18, **dict(CELLS[cell].options))
    x = torch.randn(4, 3, 17)
    grads = []
    for arrange in (lambda d: d, lambda d: d.clone(memory_format=torch.contiguous_format)):
        seed(1)
        module.zero_grad()
        y, _ = module(x)
        y.register_hook(arrange)
        GRADIENT_LAYOUTS[layout](y)
        grads.append([p.grad for p in module.parameters()])
    for got, want in zip(*grads, strict=True):
        assert torch.equal(got, want)
