"""Bad input raises what torch.nn raises, word for word, and never reads out of bounds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import PackedSequence

import problems
import rnnfast
import tolerances
from problems import Problem, forward_arrays
from reference import CELLS
from twins import LAYERS, assert_twins_agree, make, raised, states, twins

CONSTRUCTIONS = [
    (),
    (3,),
    (3, 0),
    (0, 3),
    (-1, 3),
    (3, 4.0),
    ("3", 4),
    (3, 4, 0),
    (3, 4, -1),
    (3, 4, {"dropout": 1.5}),
    (3, 4, {"dropout": -0.1}),
    (3, 4, {"dropout": True}),
    (3, 4, {"dropout": "x"}),
    (3, 4, {"bias": 1}),
    (3, 4, {"batch_first": 1}),
    (3, 4, {"proj_size": 4}),
    (3, 4, {"proj_size": -1}),
    (3, 4, {"nonlinearity": "sigmoid"}),
    (3, 4, {"hidden": 5}),
    (3, 4, {"dtype": torch.int64}),
    (3, 4, {"device": "nowhere"}),
]


def split(case):
    return (case[:-1], case[-1]) if case and isinstance(case[-1], dict) else (case, {})


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("case", CONSTRUCTIONS, ids=str)
def test_construction_of_layers(kind, case):
    args, kwargs = split(case)
    want = raised(lambda: getattr(nn, kind)(*args, **kwargs))
    assert raised(lambda: getattr(rnnfast, kind)(*args, **kwargs)) == want


CELL_CONSTRUCTIONS = [
    (),
    (3,),
    (3, -1),
    (3, 4.0),
    (3, 4, {"hidden": 5}),
    (3, 4, {"dtype": torch.int64}),
    (3, 4, {"nonlinearity": 5}),
]


@pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell", "GRUCell"])
@pytest.mark.parametrize("case", CELL_CONSTRUCTIONS, ids=str)
def test_construction_of_cells(kind, case):
    args, kwargs = split(case)
    want = raised(lambda: getattr(nn, kind)(*args, **kwargs))
    assert raised(lambda: getattr(rnnfast, kind)(*args, **kwargs)) == want


def test_reset_after_must_be_a_bool():
    for kind in (rnnfast.GRU, rnnfast.GRUCell):
        with pytest.raises(TypeError, match="reset_after should be of type bool, got: int"):
            kind(3, 4, reset_after=0)


def r(*shape, **options):
    return torch.zeros(*shape, **options)


# Calls of a module of input size 3, hidden size 4, one layer: (input, hx), where an hx made by
# `both` is a tensor for RNN and GRU, and a pair for LSTM.
def both(h, c=None):
    return lambda has_c: (h, h if c is None else c) if has_c else h


LAYER_CALLS = {
    "no time": (r(0, 2, 3), None),
    "no time, no rows": (r(0, 0, 3), None),
    "no time, unbatched": (r(0, 3), None),
    "scalar": (r(()), None),
    "1-D": (r(3), None),
    "4-D": (r(5, 2, 3, 1), None),
    "input size": (r(5, 2, 4), None),
    "input size, unbatched": (r(5, 4), None),
    "double input": (r(5, 2, 3, dtype=torch.float64), None),
    "half input": (r(5, 2, 3, dtype=torch.float16), None),
    "integer input": (r(5, 2, 3, dtype=torch.int64), None),
    "complex input": (r(5, 2, 3, dtype=torch.complex64), None),
    "meta input": (r(5, 2, 3, device="meta"), None),
    "sparse input": (r(5, 2, 3).to_sparse(), None),
    "list": ([[1.0]], None),
    "array": (np.zeros((5, 2, 3), "f"), None),
    "None": (None, None),
    "hidden size": (r(5, 2, 3), both(r(1, 2, 5))),
    "hidden rows": (r(5, 2, 3), both(r(1, 3, 4))),
    "hidden layers": (r(5, 2, 3), both(r(2, 2, 4))),
    "hidden transposed": (r(5, 2, 3), both(r(2, 1, 4))),
    "hidden 2-D": (r(5, 2, 3), both(r(2, 4))),
    "hidden 4-D": (r(5, 2, 3), both(r(1, 1, 2, 4))),
    "hidden 3-D, unbatched": (r(5, 3), both(r(1, 1, 4))),
    "hidden size, unbatched": (r(5, 3), both(r(1, 5))),
    "hidden double": (r(5, 2, 3), both(r(1, 2, 4, dtype=torch.float64))),
    "hidden integer": (r(5, 2, 3), both(r(1, 2, 4, dtype=torch.int64))),
    "hidden meta": (r(5, 2, 3), both(r(1, 2, 4, device="meta"))),
    "cell size": (r(5, 2, 3), both(r(1, 2, 4), r(1, 2, 5))),
    "cell rows": (r(5, 2, 3), both(r(1, 2, 4), r(1, 3, 4))),
    "cell 2-D": (r(5, 2, 3), both(r(1, 2, 4), r(2, 4))),
    "cell double": (r(5, 2, 3), both(r(1, 2, 4), r(1, 2, 4, dtype=torch.float64))),
    "pair": (r(5, 2, 3), (r(1, 2, 4), r(1, 2, 4))),
    "single": (r(5, 2, 3), r(1, 2, 4)),
    "pair of one": (r(5, 2, 3), (r(1, 2, 4),)),
    "three": (r(5, 2, 3), (r(1, 2, 4),) * 3),
    "list of two": (r(5, 2, 3), [r(1, 2, 4), r(1, 2, 4)]),
    "hidden list": (r(5, 2, 3), [[0.0]]),
    "hidden number": (r(5, 2, 3), 0),
    "packed None": (PackedSequence(None, torch.tensor([1])), None),
    "packed list": (PackedSequence([[1.0, 2.0, 3.0]], torch.tensor([1])), None),
}


@pytest.mark.parametrize("cell", LAYERS)
@pytest.mark.parametrize("grad", [True, False], ids=["", "no_grad"])
@pytest.mark.parametrize("call", LAYER_CALLS)
def test_calls_of_layers(cell, grad, call):
    """Type and message, or no exception, as torch.nn."""
    x, hx = LAYER_CALLS[call]
    hx = hx(CELLS[cell].has_c) if callable(hx) else hx
    ours, theirs = twins(cell, 3, 4)
    with torch.set_grad_enabled(grad):
        assert raised(lambda: ours(x, hx)) == raised(lambda: theirs(x, hx))


CELL_CALLS = {
    "scalar": (r(()), None),
    "3-D": (r(1, 2, 3), None),
    "input size": (r(2, 4), None),
    "input size, unbatched": (r(4), None),
    "double input": (r(2, 3, dtype=torch.float64), None),
    "integer input": (r(2, 3, dtype=torch.int64), None),
    "meta input": (r(2, 3, device="meta"), None),
    "list": ([1.0], None),
    "None": (None, None),
    "no rows": (r(0, 3), None),
    "hidden size": (r(2, 3), both(r(2, 5))),
    "hidden rows": (r(2, 3), both(r(3, 4))),
    "hidden one row": (r(2, 3), both(r(1, 4))),
    "hidden 1-D": (r(2, 3), both(r(4))),
    "hidden 3-D": (r(2, 3), both(r(1, 2, 4))),
    "hidden 2-D, unbatched": (r(3), both(r(1, 4))),
    "hidden size, unbatched": (r(3), both(r(5))),
    "hidden double": (r(2, 3), both(r(2, 4, dtype=torch.float64))),
    "hidden meta": (r(2, 3), both(r(2, 4, device="meta"))),
    "cell size": (r(2, 3), both(r(2, 4), r(2, 5))),
    "cell rows": (r(2, 3), both(r(2, 4), r(3, 4))),
    "cell one row": (r(2, 3), both(r(2, 4), r(1, 4))),
    "cell double": (r(2, 3), both(r(2, 4), r(2, 4, dtype=torch.float64))),
    "pair": (r(2, 3), (r(2, 4), r(2, 4))),
    "single": (r(2, 3), r(2, 4)),
    "pair of one": (r(2, 3), (r(2, 4),)),
    "three": (r(2, 3), (r(2, 4),) * 3),
    "list of two": (r(2, 3), [r(2, 4), r(2, 4)]),
    "hidden number": (r(2, 3), 0),
}


@pytest.mark.parametrize("cell", LAYERS)
@pytest.mark.parametrize("grad", [True, False], ids=["", "no_grad"])
@pytest.mark.parametrize("call", CELL_CALLS)
def test_calls_of_cells(cell, grad, call):
    x, hx = CELL_CALLS[call]
    hx = hx(CELLS[cell].has_c) if callable(hx) else hx
    ours, theirs = twins(cell, 3, 4, suffix="Cell")
    with torch.set_grad_enabled(grad):
        assert raised(lambda: ours(x, hx)) == raised(lambda: theirs(x, hx))


def test_unknown_nonlinearity_of_a_cell():
    ours, theirs = (package.RNNCell(3, 4, nonlinearity="sinus") for package in (rnnfast, nn))
    assert raised(lambda: ours(r(2, 3))) == raised(lambda: theirs(r(2, 3))) != None  # noqa: E711


def replaced(module, name, value):
    getattr(module, name).data = value
    return module


every_weight = pytest.mark.parametrize("name", ["weight_ih", "weight_hh", "bias_ih", "bias_hh"])
every_suffix = pytest.mark.parametrize("suffix", ["", "Cell"], ids=["layer", "cell"])

SHAPES = {
    "smaller": lambda w: w[:2, :2].clone() if w.dim() == 2 else w[:2].clone(),
    "fewer columns": lambda w: w[..., :-1].clone(),
    "flat": lambda w: w.flatten() if w.dim() == 2 else w.view(2, -1),
    "transposed": lambda w: w.t().contiguous() if w.dim() == 2 else w[:, None].clone(),
    "empty": lambda w: w[:0],
    "a number": lambda w: w.flatten()[0].clone(),
    "no columns": lambda w: w[..., :0].clone(),
}


@pytest.mark.parametrize("cell", CELLS)
@every_suffix
@every_weight
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_of_another_shape_raise(cell, suffix, name, shape):
    """torch.nn.LSTM reads out of bounds here; an exception is the least that we owe."""
    module = make(rnnfast, cell, 3, 4, suffix=suffix)
    weight = getattr(module, name + ("" if suffix else "_l0"))
    before = weight.shape
    weight.data = SHAPES[shape](weight.detach())
    if weight.shape == before:
        return  # a square one, transposed
    x = r(*(() if suffix else (5,)), 2, 3)
    for grad in (True, False):
        with (
            torch.set_grad_enabled(grad),
            pytest.raises(RuntimeError),
        ):
            module(x)


@pytest.mark.parametrize("cell", LAYERS)
@every_suffix
@every_weight
@pytest.mark.parametrize("to", [torch.float64, torch.float16, torch.int64, "meta"], ids=str)
def test_weights_of_another_type(cell, suffix, name, to):
    """As torch.nn: the same exception, or an answer."""
    x, results = r(*(() if suffix else (5,)), 2, 3), []
    for module in twins(cell, 3, 4, suffix=suffix):
        full = name + ("" if suffix else "_l0")
        weight = nn.Parameter(getattr(module, full).detach().to(to), requires_grad=False)
        setattr(module, full, weight)
        results.append(raised(lambda m=module: m(x)))
    assert results[0] == results[1]


@pytest.mark.parametrize("cell", LAYERS)
def test_strided_weights_are_right(cell):
    """Weights may have any strides: a transposed view, a slice, one row for all."""
    ours, theirs = twins(cell, 4, 4)
    for module in (ours, theirs):
        module.weight_ih_l0.data = (
            torch.linspace(-1, 1, 16).view(4, 4)[1].expand(module.weight_ih_l0.shape)
        )
        rows = len(module.weight_hh_l0)
        module.weight_hh_l0.data = torch.linspace(-1, 1, 8 * rows).view(8, rows)[::2].t()
        module.bias_hh_l0.data = torch.linspace(-1, 1, 2 * rows)[::2]
    assert_twins_agree(ours, theirs, torch.randn(5, 2, 4))


def misaligned(shape, dtype):
    """Zeros one byte off every alignment."""
    dtype = np.dtype(dtype)
    return np.zeros(math.prod(shape) * dtype.itemsize + 1, "u1")[1:].view(dtype).reshape(shape)


def arrays_of(cell="lstm"):
    arrays = Problem(cell, 5, 2, 3, 4).inputs()
    return arrays | {"cell": cell}


# (what to change in good arguments, the exception, what its message must name)
ARRAYS_CALLS = {
    "unknown cell": ({"cell": "lstn"}, ValueError, ["lstn", "lstm"]),
    "2-D x": ({"x": np.zeros((5, 3), "f")}, ValueError, ["x", "(5, 3)"]),
    "w_ih columns": ({"w_ih": np.zeros((16, 5), "f")}, ValueError, ["w_ih", "5", "3"]),
    "w_ih rows": ({"w_ih": np.zeros((15, 3), "f")}, ValueError, ["w_ih", "15", "16"]),
    "w_hh rows": ({"w_hh": np.zeros((12, 4), "f")}, ValueError, ["w_hh", "12", "16"]),
    "w_hh 1-D": ({"w_hh": np.zeros(16, "f")}, ValueError, ["w_hh", "(16,)"]),
    "b_ih": ({"b_ih": np.zeros(4, "f")}, ValueError, ["b_ih", "4", "16"]),
    "b_hh 2-D": ({"b_hh": np.zeros((16, 1), "f")}, ValueError, ["b_hh", "(16, 1)", "16"]),
    "h0 rows": ({"h0": np.zeros((3, 4), "f")}, ValueError, ["h0", "(3, 4)", "(2, 4)"]),
    "h0 3-D": ({"h0": np.zeros((1, 2, 4), "f")}, ValueError, ["h0", "(1, 2, 4)", "(2, 4)"]),
    "c0 size": ({"c0": np.zeros((2, 5), "f")}, ValueError, ["c0", "(2, 5)", "(2, 4)"]),
    "c0 in a GRU": ({"cell": "gru"}, ValueError, []),
    "no time": ({"x": np.zeros((0, 2, 3), "f")}, ValueError, ["x"]),
    "double x": ({"x": np.zeros((5, 2, 3))}, TypeError, ["float64", "float32"]),
    "double h0": ({"h0": np.zeros((2, 4))}, TypeError, ["h0", "float64", "float32"]),
    "double w_hh": ({"w_hh": np.zeros((16, 4))}, TypeError, ["w_hh", "float64", "float32"]),
    "integer x": ({"x": np.zeros((5, 2, 3), int)}, TypeError, ["int64", "float32"]),
    "half x": ({"x": np.zeros((5, 2, 3), "e")}, TypeError, ["float16", "float32"]),
    "swapped double h0": ({"h0": np.zeros((2, 4), ">f8")}, TypeError, ["h0", "f8", "float32"]),
    "swapped half x": ({"x": np.zeros((5, 2, 3), ">f2")}, TypeError, ["x", "f2", "float32"]),
    "misaligned integer w_ih": (
        {"w_ih": misaligned((16, 3), "i4")},
        TypeError,
        ["w_ih", "int32", "float32"],
    ),
    "misaligned double b_ih": (
        {"b_ih": misaligned((16,), "f8")},
        TypeError,
        ["b_ih", "float64", "float32"],
    ),
    "misaligned x of no dimension": ({"x": misaligned((), "f4")}, ValueError, ["x", "()"]),
    "misaligned h0 of no dimension": ({"h0": misaligned((), "f4")}, ValueError, ["h0", "()"]),
    "complex c0": ({"c0": np.zeros((2, 4), "c8")}, TypeError, ["c0", "complex64", "float32"]),
    "structured x": ({"x": np.zeros((5, 2, 3), "f4,i4")}, TypeError, ["x", "f0", "float32"]),
    "structured w_hh": ({"w_hh": np.zeros((16, 4), "f4,i4")}, TypeError, ["w_hh", "f0", "float32"]),
    "dates": ({"b_hh": np.zeros(16, "M8[s]")}, TypeError, ["b_hh", "datetime64", "float32"]),
    "integer reset": ({"reset": misaligned((5, 2), "i4")}, TypeError, ["reset", "int32", "bool"]),
    "strings": ({"x": np.full((5, 2, 3), "a")}, TypeError, ["x"]),
    "objects": ({"w_hh": np.full((16, 4), None)}, TypeError, ["w_hh", "object", "float32"]),
    "None for x": ({"x": None}, TypeError, ["x"]),
    "None for w_ih": ({"w_ih": None}, TypeError, ["w_ih"]),
    "no threads": ({"threads": 0}, ValueError, ["threads", "0"]),
    "negative threads": ({"threads": -1}, ValueError, ["threads", "-1"]),
    "many threads": ({"threads": 2**31}, ValueError, ["threads", "2147483648", "at most 2147483647"]),
    "float threads": ({"threads": 2.0}, TypeError, ["threads is 2.0; expected an integer"]),
}


@pytest.mark.parametrize("call", ARRAYS_CALLS)
@pytest.mark.parametrize("save", [False, True], ids=["", "save"])
def test_calls_of_arrays(call, save):
    change, exception, named = ARRAYS_CALLS[call]
    with pytest.raises(exception) as caught:
        forward_arrays(**(arrays_of() | change), save=save)
    assert not [word for word in named if word not in str(caught.value)], str(caught.value)


def test_states_and_weights_of_arrays():
    problem = Problem("gru", 5, 2, 3, 4).inputs()
    x, h0, *weights = problem.values()
    want = rnnfast.arrays.forward("gru", x, weights, h0)
    for hx in (list(h0), (h0, None)):
        got = rnnfast.arrays.forward("gru", x, rnnfast.arrays.Weights(*weights), hx)
        np.testing.assert_array_equal(got.y, want.y)
    for few in ([], weights[:1], [*weights, None, None]):
        with pytest.raises(TypeError, match=f"weights has {len(few)} items; expected w_ih, w_hh"):
            rnnfast.arrays.forward("gru", x, few, h0)
    for hx in (h0, [h0, h0], (h0,), (h0, h0, h0)):
        with pytest.raises(TypeError, match=r"hx must be a tuple \(h0, c0\) for lstm"):
            rnnfast.arrays.forward("lstm", x, weights, hx)


def test_reverse_is_what_is_true():
    for true in (1, "x", np.True_):
        want, got = (forward_arrays(**arrays_of(), reverse=reverse) for reverse in (True, true))
        np.testing.assert_array_equal(got.y, want.y)


def test_absurd_threads_are_survived():
    """More threads than the machine could start: an answer or an exception, not a crash."""
    want = forward_arrays(**arrays_of())
    try:
        got = forward_arrays(**arrays_of(), threads=2**31 - 1)
    except (ValueError, OverflowError):
        return
    np.testing.assert_array_equal(got.y, want.y)


BACKWARD_CALLS = {
    "dy steps": ({"dy": np.zeros((4, 2, 4), "f")}, ValueError, ["dy", "(4, 2, 4)", "(5, 2, 4)"]),
    "dy 2-D": ({"dy": np.zeros((5, 8), "f")}, ValueError, ["dy", "(5, 8)", "(5, 2, 4)"]),
    "dh_n": ({"dh_n": np.zeros((1, 2, 4), "f")}, ValueError, ["dh_n", "(1, 2, 4)", "(2, 4)"]),
    "dc_n": ({"dc_n": np.zeros((2, 5), "f")}, ValueError, ["dc_n", "(2, 5)", "(2, 4)"]),
    "double dy": ({"dy": np.zeros((5, 2, 4))}, TypeError, ["dy", "float64", "float32"]),
    "misaligned half dy": (
        {"dy": misaligned((5, 2, 4), "f2")},
        TypeError,
        ["dy", "float16", "float32"],
    ),
    "structured dy": ({"dy": np.zeros((5, 2, 4), "f4,i4")}, TypeError, ["dy", "f0", "float32"]),
    "dates": ({"dc_n": np.zeros((2, 4), "M8[s]")}, TypeError, ["dc_n", "datetime64", "float32"]),
    "integer dh_n": ({"dh_n": np.zeros((2, 4), int)}, TypeError, ["dh_n", "int64", "float32"]),
}


@pytest.mark.parametrize("call", BACKWARD_CALLS)
def test_calls_of_backward(call):
    arguments, exception, named = BACKWARD_CALLS[call]
    result = forward_arrays(**arrays_of(), save=True)
    with pytest.raises(exception) as caught:
        result.backward(**arguments)
    assert not [word for word in named if word not in str(caught.value)], str(caught.value)


def test_backward_needs_what_it_asks_for():
    with pytest.raises(RuntimeError, match="save=True"):
        forward_arrays(**arrays_of()).backward()
    arrays = arrays_of("gru_original")
    arrays.pop("c0", None)
    with pytest.raises(ValueError, match=r"dc_n|cell state"):
        forward_arrays(**arrays, save=True).backward(dc_n=np.zeros((2, 4), "f"))


sizes = st.integers(1, 40)


@settings(max_examples=150)
@given(
    cell=st.sampled_from(sorted(CELLS)),
    shape=st.tuples(st.integers(1, 6), st.integers(0, 20), sizes, sizes),
    dtype=st.sampled_from(["float32", "float64"]),
    flags=st.tuples(st.booleans(), st.booleans(), st.integers(1, 3), st.integers(0, 99)),
)
def test_any_sizes_of_arrays(cell, shape, dtype, flags):
    bias, reverse, threads, seed = flags
    problem = Problem(cell, *shape, dtype, bias=bias, reverse=reverse, seed=seed)
    problems.check(problems.by_arrays(problem, threads=threads), problem)


@settings(max_examples=300)
@given(
    cell=st.sampled_from(sorted(CELLS)),
    name=st.sampled_from(problems.INPUTS),
    shape=st.lists(st.integers(0, 9), max_size=4).map(tuple),
    dtype=st.sampled_from(["f4", "f8", "f2", "i8", "c8", "?", ">f4"]),
)
def test_any_array_in_the_place_of_another(cell, name, shape, dtype):
    """The right answer where the array fits, an exception where not; nothing in between."""
    arrays = Problem(cell, 3, 2, 5, 4).inputs()
    fits = name in arrays and shape == arrays[name].shape and dtype in ("f4", ">f4")
    try:
        got = forward_arrays(cell, **arrays | {name: np.zeros(shape, dtype)})
    except (ValueError, TypeError):
        assert not fits
        return
    want = forward_arrays(cell, **arrays | {name: np.zeros(shape, "f4")})
    np.testing.assert_array_equal(got.y, want.y)
    # x of other lengths and batches fits too, where no state says otherwise
    assert fits


@settings(max_examples=100)
@given(
    cell=st.sampled_from(LAYERS),
    sizes=st.tuples(sizes, sizes, st.integers(1, 3)),
    flags=st.tuples(*[st.booleans()] * 5),
    lengths=st.tuples(st.integers(0, 5), st.integers(0, 9)),
    wrong=st.sampled_from([0, 0, 0, 1, -1]),
)
def test_any_module(cell, sizes, flags, lengths, wrong):
    """Any configuration on any input, sometimes of a wrong size: as torch.nn, in float64."""
    bidirectional, bias, batch_first, batched, with_hx = flags
    options = {"bidirectional": bidirectional, "bias": bias, "batch_first": batch_first}
    ours, theirs = twins(cell, *sizes, dtype=torch.float64, **options)
    shape = lengths if batched else lengths[:1]
    x = torch.randn(*shape, max(sizes[0] + wrong, 0), dtype=torch.float64)
    rows = (lengths[0] if batch_first else lengths[1],) if batched else ()
    hx = states(cell, sizes[2] * (1 + bidirectional), *rows, sizes[1], dtype=torch.float64)
    args = (x, hx) if with_hx else (x,)
    expected = raised(lambda: theirs(*args))
    if expected is not None:
        assert raised(lambda: ours(*args)) == expected
        return
    assert_twins_agree(ours, theirs, *args)


def test_tolerances_are_what_the_tests_use():
    """A NaN or a wrong element must fail the comparison that everything else rests on."""
    problem = Problem("gru", 3, 2, 5, 4)
    for value in (np.nan, 1.0):
        solution = problems.by_arrays(problem)
        solution["d_w_hh"][0, 0] += value
        with pytest.raises(AssertionError, match="d_w_hh"):
            problems.check(solution, problem)
    assert tolerances.units(np.zeros(3, "f"), np.full(3, 2.0**-23)) == 1.0
