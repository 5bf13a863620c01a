"""lengths=: a padded batch whose rows differ in length, read by the kernels as it lies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.profiler import ProfilerActivity, profile

import reference
import rnnfast
from reference import CELLS
from rnnfast import _C
from rnnfast.stack import sequences
from twins import CLOSE, LAYERS, flatten, make, states

pytestmark = pytest.mark.numerics

every_cell = pytest.mark.parametrize("cell", CELLS)

STACKS = [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}, {"bias": False}]
every_stack = pytest.mark.parametrize("options", STACKS, ids=str)

# unsorted, with ties; one row; all alike; one long row among many; empty rows; nothing but those
LENGTHS = [[3, 1, 7, 7, 2], [4], [5, 5, 5], [1] * 20 + [30] + [2] * 19, [0, 3, 0, 9], [0, 0]]
every_length = pytest.mark.parametrize("lengths", LENGTHS, ids=lambda n: f"{len(n)}rows{max(n)}steps")


def problem(cell, module, lengths, extra=2):
    """A padded batch, longer than its longest row, with NaN past the ends; and states."""
    dtype = module.weight_ih_l0.dtype
    x = torch.randn(max(lengths) + extra, len(lengths), module.input_size, dtype=dtype)
    for row, length in enumerate(lengths):
        x[length:, row] = torch.nan
    x = x.transpose(0, 1).contiguous() if module.batch_first else x
    count = module.num_layers * (2 if module.bidirectional else 1)
    state = flatten(states(cell, count, len(lengths), module.hidden_size, dtype=dtype))
    return x.requires_grad_(), [h.requires_grad_() for h in state]


def hx(cell, state):
    return tuple(state) if CELLS[cell].has_c else state[0]


def row_of(t, row, module):
    return t[row : row + 1] if module.batch_first else t[:, row : row + 1]


def by_rows(run, module, x, state, lengths):
    """Each row alone, put together as a padded batch; `run` takes one row, time first, and states."""
    y, finals = [], [[] for _ in state]
    steps = x.size(1 if module.batch_first else 0)
    for row, length in enumerate(lengths):
        alone = [h[:, row : row + 1] for h in state]
        one = row_of(x, row, module)
        one = one.transpose(0, 1) if module.batch_first else one
        if length == 0:
            width = module.hidden_size * (2 if module.bidirectional else 1)
            out, *last = x.new_zeros(0, 1, width), *alone
        else:
            out, *last = run(one[:length], alone)
        y.append(nn.functional.pad(out, (0, 0, 0, 0, 0, steps - length)))
        for column, final in zip(finals, last, strict=True):
            column.append(final)
    y = torch.cat(y, 1)
    return [y.transpose(0, 1) if module.batch_first else y, *(torch.cat(f, 1) for f in finals)]


def gradients(outputs, leaves):
    torch.manual_seed(5)
    weights = [torch.randn(o.shape, dtype=torch.float64).to(o.dtype) for o in outputs]
    loss = sum((o * w).sum() for o, w in zip(outputs, weights, strict=True))
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, leaves, strict=True)]


@every_cell
@every_stack
@every_length
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_against_the_formula(cell, dtype, options, lengths):
    """Outputs and gradients of every kind; the truth is the formula in float64, row by row."""
    module = make(rnnfast, cell, 5, 17, dtype=dtype, **options)
    exact = make(rnnfast, cell, 5, 17, dtype=dtype, **options).double()
    x, state = problem(cell, module, lengths)
    y, final = module(x, hx(cell, state), lengths=torch.tensor(lengths))
    got = [y, *flatten(final)]
    got += gradients(got, [x, *state, *module.parameters()])

    def formula(x, alone):
        y, h, c = reference.stack(cell, exact, x, alone[0], alone[-1])
        return [y, h, c][: 2 + CELLS[cell].has_c]

    there = [t.detach().double().requires_grad_() for t in (x, *state)]
    want = by_rows(formula, exact, there[0], there[1:], lengths)
    want += gradients(want, [*there, *exact.parameters()])
    scale = max(*lengths, 1)  # the weights' gradients are sums over the steps
    tolerance = {name: value * scale for name, value in CLOSE[dtype].items()}
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b.to(dtype), **tolerance)


@every_cell
@pytest.mark.parametrize("options", [*STACKS, {"hidden_size": 320}], ids=str)
@pytest.mark.parametrize("packs", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("longest", [90, 600], ids=["many rows", "one row"])
def test_groups_of_rows(cell, options, packs, longest):
    """Backward runs many rows in two groups, unless the weights are large; one of them may be empty."""
    options = {"hidden_size": 17} | options
    module = make(rnnfast, cell, 5, dtype=torch.float64, **options)
    lengths = torch.randint(1, longest + 1, (19,)) if longest < 600 else torch.tensor([0] * 8 + [600])
    if packs and not lengths.all():
        pytest.skip("torch packs no row of length 0")
    x, state = problem(cell, module, lengths.tolist())
    y, final = module(x, hx(cell, state), lengths=lengths)
    if packs:
        given = pack_padded_sequence(x, lengths, module.batch_first, enforce_sorted=False)
        y, final = module(given, hx(cell, state))
        y = pad_packed_sequence(y, module.batch_first, total_length=int(lengths.max()) + 2)[0]
    got = gradients([y, *flatten(final)], [x, *state, *module.parameters()])

    def formula(x, alone):
        y, h, c = reference.stack(cell, module, x, alone[0], alone[-1])
        return [y, h, c][: 2 + CELLS[cell].has_c]

    outputs = by_rows(formula, module, x, state, lengths.tolist())
    want = gradients(outputs, [x, *state, *module.parameters()])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@every_cell
@every_stack
@every_length
@pytest.mark.numerics(dtype="bfloat16")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_of_a_row_alone(cell, dtype, options, lengths):
    """Outputs, final states and gradients of inputs; past the ends both are zero."""
    module = make(rnnfast, cell, 5, 17, dtype=dtype, **options)
    x, state = problem(cell, module, lengths)

    def alone(x, given):
        x = x.transpose(0, 1) if module.batch_first else x
        y, final = module(x, hx(cell, given))
        return [y.transpose(0, 1) if module.batch_first else y, *flatten(final)]

    y, final = module(x, hx(cell, state), lengths=lengths)
    results = [[y, *flatten(final)], by_rows(alone, module, x, state, lengths)]
    for outputs in results:
        outputs += gradients(outputs, [x, *state])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    for row, length in enumerate(lengths):
        for t in (y, results[0][1 + len(state)]):
            past = row_of(t, row, module).flatten(0, 1)[length:]
            assert not past.any()


@every_cell
@every_length
def test_threads_partitions_and_frozen_weights_change_no_bit(cell, lengths):
    module = make(rnnfast, cell, 30, 70, 2)
    x, state = problem(cell, module, lengths)
    reset = torch.rand(x.shape[:2]) < 0.2
    given = {"lengths": torch.tensor(lengths), "reset": reset}
    results = []
    for threads, way in ((1, "chosen"), (2, "rows"), (3, "rows"), (3, "units"), (2, "wavefront")):
        torch.set_num_threads(threads)
        _C.force_partition(way, oversubscribe=True)
        y, final = module(x, hx(cell, state), **given)
        outputs = [y, *flatten(final)]
        results.append(outputs + gradients(outputs, [x, *state, *module.parameters()]))
        with torch.no_grad():
            assert torch.equal(module(x, hx(cell, state), **given)[0], y)
            with rnnfast.frozen(module):
                assert torch.equal(module(x, hx(cell, state), **given)[0], y)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("hidden", [70, 320])  # with and without two groups of rows
@every_cell
def test_both_directions_at_once(cell, hidden):
    """Each with a gradient of the input of its own, which are added up."""
    module = make(rnnfast, cell, 40, hidden, bidirectional=True)
    lengths = torch.randint(0, 60, (20,))
    x, state = problem(cell, module, lengths.tolist())
    results = []
    for threads, way in ((1, "one"), (2, "directions"), (3, "directions")):
        torch.set_num_threads(threads)
        _C.force_partition(way, oversubscribe=True)
        y, final = module(x, hx(cell, state), lengths=lengths)
        results.append(gradients([y, *flatten(final)], [x, *state, *module.parameters()]))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@every_cell
@pytest.mark.parametrize("options", [*STACKS, {"num_layers": 3, "dropout": 0.5}], ids=str)
def test_is_packing_and_padding(cell, options):
    """With resets and cell states too; a PackedSequence of dropout has other masks."""
    module = make(rnnfast, cell, 5, 17, **options).eval()
    lengths = torch.tensor(LENGTHS[0])
    x, state = problem(cell, module, LENGTHS[0])
    reset = torch.rand(x.shape[:2]) < 0.3
    extra = {"return_cell_states": True} if CELLS[cell].has_c else {}
    first = module.batch_first

    def packed(t):
        return pack_padded_sequence(t, lengths, first, enforce_sorted=False)

    flags = PackedSequence(packed(reset[..., None]).data[:, 0], *packed(x)[1:])
    total = x.size(1 if first else 0)
    want, want_final, *want_cells = module(packed(x), hx(cell, state), reset=flags, **extra)
    got, final, *cells = module(x, hx(cell, state), lengths=lengths, reset=reset, **extra)
    for a, b in zip((got, *cells), (want, *want_cells), strict=True):
        assert torch.equal(a, pad_packed_sequence(b, first, total_length=total)[0])
    for a, b in zip(flatten(final), flatten(want_final), strict=True):
        assert torch.equal(a, b)


def test_dropout_between_layers():
    module = make(rnnfast, "gru", 5, 17, 3, dropout=0.5, batch_first=True)
    x, _ = problem("gru", module, LENGTHS[0])
    y, _ = module(x, lengths=LENGTHS[0])
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    for row, length in enumerate(LENGTHS[0]):
        assert not y[row, length:].any()
        assert y[row, :length].any()


@every_cell
def test_derivatives(cell):
    """The first and the second, by differences."""
    module = make(rnnfast, cell, 3, 4, 2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(4, 3, 3, dtype=torch.float64, requires_grad=True)
    state = flatten(states(cell, 4, 3, 4, dtype=torch.float64))
    leaves = (x, *(h.requires_grad_() for h in state))

    def function(x, *state):
        return flatten(module(x, hx(cell, state), lengths=[2, 4, 0]))

    assert gradcheck(function, leaves)
    assert cell == "rnn_relu" or gradgradcheck(function, leaves, atol=1e-4)


def test_lengths_may_change_after_the_call():
    """Their memory is the caller's, who may fill it with the lengths of the next batch."""
    module = make(rnnfast, "lstm", 5, 17)
    x, _ = problem("lstm", module, LENGTHS[0])
    lengths = torch.tensor(LENGTHS[0])
    grads = []
    for change in (False, True):
        y, _ = module(x, lengths=lengths)
        lengths.fill_(1 if change else lengths[0])
        lengths.copy_(torch.tensor(LENGTHS[0])) if not change else None
        grads += torch.autograd.grad(y.square().sum(), x)
    assert torch.equal(*grads)


@pytest.mark.parametrize(
    "kind",
    [
        *(list, tuple, np.array, torch.tensor),
        lambda n: torch.tensor(n, dtype=torch.int32),
        lambda n: torch.tensor([n, n]).T[:, 0],
        lambda n: np.array(n, np.uint8),
    ],
    ids=["list", "tuple", "numpy", "tensor", "int32", "strided", "uint8"],
)
def test_kinds_of_lengths(kind):
    module = make(rnnfast, "gru", 5, 17)
    x, _ = problem("gru", module, LENGTHS[0])
    assert torch.equal(
        module(x, lengths=kind(LENGTHS[0]))[0], module(x, lengths=torch.tensor(LENGTHS[0]))[0]
    )


BAD = {
    "too long": (
        [3, 1, 8],
        RuntimeError,
        r"between 0 and the 7 steps of the input, but lengths\[2\] is 8",
    ),
    "negative": ([3, -1, 7], RuntimeError, r"but lengths\[1\] is -1"),
    "huge": ([3, 2**62, 7], RuntimeError, r"but lengths\[1\] is 4611686018427387904"),
    "too few": ([3, 7], ValueError, "lengths has 2 entries; the batch has 3 rows"),
    "too many": ([3, 7, 7, 7], ValueError, "lengths has 4 entries; the batch has 3 rows"),
    "2-D": ([[3, 1, 7]], ValueError, "lengths must have one dimension, got 2"),
    "float": ([3.5, 1.0, 7.0], TypeError, "lengths must be integers, got torch.float32"),
    "bool": ([True, False, True], TypeError, "lengths must be integers, got torch.bool"),
}


@pytest.mark.parametrize("cell", ["lstm", "gru_original"])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("way", ["kernels", "grad", "operators", "packing"])
def test_bad_lengths(cell, bad, way):
    """The same words whichever way computes it."""
    module, x = make(rnnfast, cell, 5, 17), torch.randn(7, 3, 5)
    lengths, kind, words = BAD[bad]
    if way == "packing":
        module, x = module.half(), Marked(x.half())

    def run(x):
        return module(x, lengths=torch.tensor(lengths))[0].sum()

    run = torch.func.grad(run) if way == "operators" else run
    with torch.set_grad_enabled(way == "grad"), pytest.raises(kind, match=words):
        run(x)


def test_what_lengths_belong_to():
    module = make(rnnfast, "gru", 5, 17)
    packed = pack_padded_sequence(torch.randn(3, 2, 5), torch.tensor([3, 1]))
    with pytest.raises(TypeError, match="got PackedSequence"):
        module(packed, lengths=[3, 1])
    with pytest.raises(ValueError, match="3-D"):
        module(torch.randn(7, 5), lengths=[7])
    with pytest.raises(RuntimeError, match="CPU int64 tensor, but got 1D meta tensor"):
        module(torch.randn(7, 2, 5), lengths=torch.ones(2, dtype=torch.int64, device="meta"))
    assert module(torch.randn(7, 0, 5), lengths=[])[0].shape == (7, 0, 17)


def test_extension_refuses_bad_lengths():
    """Where no Python looked at them before."""
    stack = _C.Stack(cell=2, bias=False)
    x, weights = torch.zeros(4, 3, 5), [torch.zeros(28, 5), torch.zeros(28, 7)]

    def run(lengths):
        return stack.call((torch.Tensor,), 1, (x, None, None, weights, lengths, None), None, None)

    assert run(torch.tensor([4, 0, 2])) is not None
    for lengths in (
        torch.tensor([4, 0]),
        torch.tensor([4, 0, 2], dtype=torch.int32),
        torch.zeros(3, 1),
    ):
        assert run(lengths) is None
    for lengths in ([5, 0, 0], [0, -1, 0], [0, 0, 2**63 - 1]):
        with pytest.raises(RuntimeError, match="between 0 and the 4 steps"):
            run(torch.tensor(lengths))


class Marked(torch.Tensor):
    """A subclass, which the kernels leave to torch."""


@pytest.mark.parametrize("cell", LAYERS)
@pytest.mark.parametrize("options", STACKS[:2], ids=str)
@pytest.mark.parametrize("lengths", [LENGTHS[0], LENGTHS[4], LENGTHS[5]], ids=str)
@pytest.mark.parametrize("state", [False, True], ids=["", "hx"])
def test_on_the_layers_of_torch(cell, options, lengths, state):
    """By packing, where no kernel takes a call: the same answers, rows of length 0 included."""
    module = make(rnnfast, cell, 5, 17, **options)
    x, given = problem(cell, module, lengths)
    given = hx(cell, given) if state else None
    want = flatten(module(x, given, lengths=lengths))
    calls = []

    def run(packed, state, reset):
        calls.append(packed)
        return rnnfast.nn.ORIGINALS[type(module)].forward(module, packed, state)

    got = sequences.by_packing(run, x, given, torch.tensor(lengths), None, module.batch_first)
    assert len(calls) == 1
    marked = module(x.detach().as_subclass(Marked), given, lengths=lengths)
    for a, b, c in zip(flatten(got), want, flatten(marked), strict=True):
        torch.testing.assert_close(a, b, **CLOSE[torch.float32])
        torch.testing.assert_close(c.as_subclass(torch.Tensor), b, **CLOSE[torch.float32])
    a, b = (torch.autograd.grad(flatten(y)[0].sum(), x)[0] for y in (got, want))
    torch.testing.assert_close(a, b, **CLOSE[torch.float32])


def test_neither_x_nor_y_is_copied():
    """Beside a call without lengths torch copies the lengths, and nothing else."""
    module = make(rnnfast, "lstm", 5, 17)
    x, _ = problem("lstm", module, LENGTHS[0])
    x = x.detach().nan_to_num().requires_grad_()
    ran = []
    for given in ({}, {"lengths": torch.tensor(LENGTHS[0])}):
        module.zero_grad()
        x.grad = None
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True, acc_events=True) as p:
            module(x, **given)[0].sum().backward()
        ran.append({(e.name, str(e.input_shapes)) for e in p.events() if e.name.startswith("aten::")})
    without, with_lengths = ran
    assert len(without) > 5
    assert {name for name, _ in with_lengths - without} <= {
        "aten::clone",
        "aten::copy_",
        "aten::empty_like",
        "aten::to",
    }
    assert all(shapes.startswith("[[5]") for _, shapes in with_lengths - without)


def loss_of(module, lengths):
    def loss(x):
        y, final = module(x, lengths=lengths)
        return y.square().sum() + flatten(final)[0].sum()

    return loss


@every_cell
@pytest.mark.parametrize("lengths", [[3, 1, 4], torch.tensor([3, 0, 4])], ids=["list", "tensor"])
def test_function_transforms(cell, lengths):
    """torch.func.grad, jvp, jacrev, vmap, and gradients per sample, each beside autograd's."""
    module = make(rnnfast, cell, 5, 17, dtype=torch.float64, bidirectional=True)
    x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    loss = loss_of(module, lengths)
    (want,) = torch.autograd.grad(loss(x), x)
    close = CLOSE[torch.float64]
    here, tangent = x.detach(), torch.randn_like(x)
    torch.testing.assert_close(torch.func.grad(loss)(here), want, **close)
    torch.testing.assert_close(torch.func.jacrev(loss)(here), want, **close)
    torch.testing.assert_close(
        torch.func.jvp(loss, (here,), (tangent,))[1], (want * tangent).sum(), **close
    )
    many = torch.randn(2, *x.shape, dtype=x.dtype)
    torch.testing.assert_close(
        torch.func.vmap(loss)(many), torch.stack([loss(one) for one in many]), **close
    )
    each = torch.func.vmap(torch.func.grad(loss))(many)
    torch.testing.assert_close(each[1], torch.func.grad(loss)(many[1]), **close)


@every_cell
def test_gradients_per_sample(cell):
    """Under vmap over the rows, each with its length."""
    module = make(rnnfast, cell, 5, 7, dtype=torch.float64)
    parameters = dict(module.named_parameters())
    x, lengths = torch.randn(3, 4, 5, dtype=torch.float64), torch.tensor([3, 0, 4])

    def loss(parameters, x, length):
        given = {"lengths": length[None]}
        y, _ = torch.func.functional_call(module, parameters, (x[:, None],), given)
        return y.square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, lengths)
    for row in range(3):
        y = module(x[row][:, None], lengths=lengths[row : row + 1])[0].square().sum()
        for a, b in zip(found.values(), torch.autograd.grad(y, list(parameters.values())), strict=True):
            torch.testing.assert_close(a[row], b, **CLOSE[torch.float64])


@pytest.mark.parametrize("lengths", [[3, 1, 4], torch.tensor([3, 1, 4])], ids=["list", "tensor"])
def test_another_default_device(lengths):
    module, x = make(rnnfast, "lstm", 5, 17), torch.randn(4, 3, 5)
    want, _ = module(x, lengths=lengths)
    torch.set_default_device("meta")
    try:
        got, _ = module(x, lengths=lengths)
        grad = torch.func.grad(loss_of(module, lengths))(x)
    finally:
        torch.set_default_device(None)
    assert torch.equal(got, want)
    torch.testing.assert_close(grad, torch.func.grad(loss_of(module, lengths))(x))


@every_cell
def test_no_method_that_a_user_overrides_is_called(cell):
    """A subclass, and a function wrapped around forward, see each call once."""
    module = make(rnnfast, cell, 5, 17)
    calls = []

    class Sub(type(module)):
        def forward(self, x, hx=None):
            calls.append("subclass")
            return super().forward(x, hx, lengths=[3, 1, 4])

    x = torch.randn(4, 3, 5)
    want = module(x, lengths=[3, 1, 4])[0]
    sub = make(rnnfast, cell, 5, 17)
    sub.__class__ = Sub
    assert torch.equal(sub(x)[0], want)
    original = module.forward

    def wrapped(*args, **kwargs):
        calls.append("wrapped")
        return original(*args, **kwargs)

    module.forward = wrapped
    assert torch.equal(module(x, lengths=[3, 1, 4])[0], want)
    reset = torch.zeros(4, 3, dtype=torch.bool)
    assert torch.equal(module(x, lengths=[3, 1, 4], reset=reset)[0], want)
    module(Marked(x), lengths=[3, 1, 4])  # on torch's layers
    assert calls == ["subclass", "wrapped", "wrapped", "wrapped"]
