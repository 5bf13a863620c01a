"""LSTMs whose h is projected (proj_size): everything that the other tests ask of the plain cells."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import problems
import reference
import rnnfast
from packed import LENGTHS, run_packed, run_rows
from packed import gradients as gradients_of
from problems import Problem, forward_arrays, same_bits
from twins import CLOSE, assert_twins_agree, flatten, make, twins

numerics = pytest.mark.numerics  # of the tests that depend on the instruction set
pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]

every_dtype = pytest.mark.parametrize("dtype", ["float32", "float64"])

# (T, B, I, H, R): below, at and above a vector; one row and many; one step; no rows
SHAPES = [
    (1, 1, 1, 2, 1),
    (1, 3, 5, 17, 7),
    (1, 9, 5, 70, 33),
    (5, 1, 3, 17, 16),
    (7, 2, 65, 33, 32),
    (4, 5, 1, 65, 3),
    (3, 7, 33, 257, 130),
    (6, 33, 17, 65, 64),
    (20, 1, 130, 257, 65),
    (3, 70, 65, 20, 19),
    (60, 9, 9, 70, 17),
    (3, 300, 5, 40, 24),
    (4, 0, 3, 17, 5),
]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "T{}B{}I{}H{}R{}".format(*s))


def problem_of(shape, dtype="float32", **options):
    steps, batch, inputs, hidden, outputs = shape
    return Problem("lstm", steps, batch, inputs, hidden, dtype, R=outputs, **options)


@numerics
@every_shape
@every_dtype
@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
def test_arrays(shape, dtype, reverse):
    problem = problem_of(shape, dtype, reverse=reverse)
    problems.check(problems.by_arrays(problem), problem)


@numerics
@every_shape
@pytest.mark.parametrize("bias", [True, False])
def test_modules(shape, bias):
    problem = problem_of(shape, bias=bias)
    problems.check(problems.by_module(problem), problem)


@numerics
@every_shape
@every_dtype
def test_threads(shape, dtype):
    problem = problem_of(shape, dtype)
    one = problems.by_arrays(problem, threads=1)
    for threads in (2, 3):
        same_bits(problems.by_arrays(problem, threads=threads), one)


@numerics
@pytest.mark.parametrize("sizes", [(5, 17, 7), (33, 65, 33), (130, 257, 130)], ids=str)
def test_rows_alone_and_together(sizes):
    arrays = problem_of((3, 40, *sizes)).inputs()
    whole = forward_arrays("lstm", **arrays)
    for rows in (slice(0, 1), slice(0, 5), slice(7, 8), slice(0, 17), slice(39, 40)):
        cut = {k: v[..., rows, :] if k in ("x", "h0", "c0") else v for k, v in arrays.items()}
        part = forward_arrays("lstm", **cut)
        for name in ("y", "h_n", "c_n"):
            assert getattr(part, name).tobytes() == getattr(whole, name)[..., rows, :].tobytes()


@numerics
@pytest.mark.parametrize("batch", [1, 9])
def test_streamed_in_chunks_of_every_length(batch):
    module = make(rnnfast, "lstm", 5, 37, proj_size=19)
    x = torch.randn(12, batch, 5)
    with torch.no_grad():
        want, _ = module(x)
        for length in range(1, 12):
            state, pieces = None, []
            for chunk in x.split(length):
                y, state = module(chunk, state)
                pieces.append(y)
            assert torch.equal(torch.cat(pieces), want)


STACKS = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 3, "batch_first": True, "bias": False},
]


@numerics
@pytest.mark.parametrize("options", STACKS, ids=str)
@pytest.mark.parametrize("hx", [False, True], ids=["", "hx"])
def test_stacks_agree_with_torch(options, hx):
    ours, theirs = twins("lstm", 5, 17, proj_size=7, **options)
    count = ours.num_layers * (2 if ours.bidirectional else 1)
    batch = 4 if ours.batch_first else 3
    state = (torch.randn(count, batch, 7), torch.randn(count, batch, 17))
    assert_twins_agree(ours, theirs, torch.randn(4, 3, 5), *([state] if hx else []))
    with torch.no_grad():  # the way without gradients is another
        x = torch.randn(4, 3, 5)
        for a, b in zip(flatten(ours(x)), flatten(theirs(x)), strict=True):
            torch.testing.assert_close(a, b, **CLOSE[b.dtype])


@numerics
def test_cell_states_of_both_directions():
    """They lie H numbers apart, the outputs R."""
    both, x = make(rnnfast, "lstm", 5, 17, proj_size=7, bidirectional=True), torch.randn(4, 3, 5)
    y, (h_n, c_n), cells = both(x, return_cell_states=True)
    for number, suffix in enumerate(("", "_reverse")):
        one = make(rnnfast, "lstm", 5, 17, proj_size=7)
        one.load_state_dict({name: getattr(both, name + suffix) for name in one.state_dict()})
        given = x.flip(0) if suffix else x
        outputs, states, want = one(given, return_cell_states=True)
        got = cells[..., 17 * number :][..., :17]
        assert torch.equal(got.flip(0) if suffix else got, want)
        assert torch.equal(h_n[number], states[0][0])
        assert torch.equal(c_n[number], states[1][0])
        part = y[..., 7 * number :][..., :7]
        assert torch.equal(part.flip(0) if suffix else part, outputs)


def test_unbatched():
    ours, theirs = twins("lstm", 5, 17, proj_size=7)
    state = (torch.randn(1, 7), torch.randn(1, 17))
    assert_twins_agree(ours, theirs, torch.randn(4, 5), state)


@numerics
@pytest.mark.parametrize("options", STACKS[:2], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda n: f"{len(n)}rows{max(n)}steps")
def test_packed(options, lengths):
    module = make(rnnfast, "lstm", 5, 17, proj_size=7, dtype=torch.float64, **options)
    count = module.num_layers * (2 if module.bidirectional else 1)
    state = tuple(torch.randn(count, len(lengths), n, dtype=torch.float64) for n in (7, 17))
    x = torch.randn(max(lengths), len(lengths), 5, dtype=torch.float64)
    results = []
    for run in ("packed", "formula"):
        here = x.clone().requires_grad_()
        given = tuple(h.clone().requires_grad_() for h in state)
        if run == "packed":
            outputs = run_packed(module, here, given, lengths)
        else:
            outputs = run_rows(
                lambda x, alone: reference.stack("lstm", module, x, *alone), here, given, lengths
            )
        results.append([*outputs, *gradients_of(module, outputs, here, given)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, **CLOSE[torch.float64])


@numerics
def test_gradients_of_every_order():
    module = make(rnnfast, "lstm", 2, 4, proj_size=3, bidirectional=True, dtype=torch.float64)
    names = [name for name, _ in module.named_parameters()]

    def function(x, h0, c0, *values):
        parameters = dict(zip(names, values, strict=True))
        return flatten(torch.func.functional_call(module, parameters, (x, (h0, c0))))

    inputs = [torch.randn(*shape, dtype=torch.float64) for shape in ((3, 2, 2), (2, 2, 3), (2, 2, 4))]
    inputs = [*(t.requires_grad_() for t in inputs), *module.parameters()]
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs, fast_mode=True)


@numerics
@pytest.mark.parametrize("wanted", ["x", "h0", "c0", "w_ih", "w_hh", "b_ih", "w_hr"])
def test_one_gradient_alone_is_the_same(wanted):
    arrays = problem_of((7, 9, 17, 37, 19)).inputs()
    tensors = {name: torch.from_numpy(value) for name, value in arrays.items()}
    module = make(rnnfast, "lstm", 17, 37, proj_size=19)

    def gradient(names):
        leaves = {name: value.clone().requires_grad_(name in names) for name, value in tensors.items()}
        for name in problems.PARAMETERS:
            parameter = torch.nn.Parameter(leaves[name], requires_grad=name in names)
            setattr(module, problems.PARAMETERS[name] + "_l0", parameter)
            leaves[name] = parameter
        y, (h, c) = module(leaves["x"], (leaves["h0"][None], leaves["c0"][None]))
        return torch.autograd.grad(y.square().sum() + h.sum() + c.sum(), leaves[wanted])[0]

    assert torch.equal(gradient([wanted]), gradient(list(tensors)))


def test_accelerate_takes_them():
    model = torch.nn.LSTM(5, 17, proj_size=7, bidirectional=True)
    x = torch.randn(4, 3, 5)
    want = model(x)[0]
    rnnfast.accelerate(model, report=None)
    assert type(model) is rnnfast.LSTM
    torch.testing.assert_close(model(x)[0], want, **CLOSE[torch.float32])


@numerics
def test_an_infinite_input_stays_in_its_row():
    arrays = problem_of((5, 9, 3, 37, 19)).inputs()
    want = forward_arrays("lstm", **arrays, save=True)
    dy = np.ones_like(want.y)
    want_dx = want.backward(dy).x
    arrays["x"][2, 4] = np.inf
    got = forward_arrays("lstm", **arrays, save=True)
    others = np.arange(9) != 4
    assert got.y[:, others].tobytes() == want.y[:, others].tobytes()
    assert got.backward(dy).x[:, others].tobytes() == want_dx[:, others].tobytes()


@pytest.mark.numerics(dtype="bfloat16")
@pytest.mark.parametrize(
    "make",
    [
        lambda **o: rnnfast.LSTM(3, 5, proj_size=3, **o),
        lambda **o: rnnfast.LSTM(3, 5, proj_size=3, coupled_gates=True, **o),
        lambda **o: rnnfast.GRU(3, 5, reset_after=False, **o),
    ],
    ids=["projected", "coupled", "original"],
)
def test_an_infinite_input_is_no_nan_in_the_padding_of_an_odd_width(make):
    """A word of a product in bfloat16 has two numbers, and the last one may be padding."""
    module = make()
    x = torch.randn(4, 2, 3)
    x[0, 0, 1] = math.inf
    with torch.no_grad():
        want = module(x)[0]
        got = module.bfloat16()(x.bfloat16())[0]
    assert want[:, 1].isfinite().all()
    assert torch.equal(got.isfinite(), want.isfinite())


BAD = {
    "w_hr of one dimension": ({"w_hr": np.zeros(17, "f")}, "w_hr has shape (17,); expected (R, H)"),
    "another R": ({"w_hr": np.zeros((6, 17), "f")}, "w_hr has shape (6, 17); expected (7, 17)"),
    "another H": ({"w_hr": np.zeros((7, 16), "f")}, "expected"),
    "h0 of the cell's width": ({"h0": np.zeros((2, 17), "f")}, "h0 has shape (2, 17); expected (2, 7)"),
    "c0 of h's width": ({"c0": np.zeros((2, 7), "f")}, "c0 has shape (2, 7); expected (2, 17)"),
    "w_hh square": ({"w_hh": np.zeros((68, 17), "f")}, "expected"),
    "no columns": ({"w_hr": np.zeros((7, 0), "f")}, "w_hr has no columns"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_arrays(bad):
    changes, message = BAD[bad]
    arrays = problem_of((3, 2, 5, 17, 7)).inputs() | changes
    with pytest.raises(ValueError, match=r"expected|columns") as info:
        forward_arrays("lstm", **arrays)
    assert message in str(info.value)


def test_other_cells_have_none():
    arrays = Problem("gru", 3, 2, 5, 17).inputs()
    with pytest.raises(ValueError, match="gru has no projection"):
        forward_arrays("gru", **arrays, w_hr=np.zeros((17, 17), "f"))


@pytest.mark.parametrize(
    "sizes", [((2, 3, 17), (2, 3, 17)), ((2, 3, 7), (2, 3, 7)), ((2, 4, 7), (2, 4, 17))]
)
def test_bad_states_raise_as_torch_does(sizes):
    ours, theirs = twins("lstm", 5, 17, proj_size=7, bidirectional=True)
    state = tuple(torch.zeros(size) for size in sizes)
    messages = []
    for module in (ours, theirs):
        with pytest.raises(RuntimeError) as info:
            module(torch.randn(4, 3, 5), state)
        messages.append(str(info.value))
    assert messages[0] == messages[1]
