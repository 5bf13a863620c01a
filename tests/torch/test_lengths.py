"""lengths=: a padded batch whose rows differ in length, read by the kernels as it lies."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import reference
import rnnfast
from padded import LENGTHS, STACKS, every_cell, every_stack, hx, problem
from reference import CELLS
from rnnfast import _C
from seeds import seed
from threads import set_threads
from twins import CLOSE, flatten, make, states

numerics = pytest.mark.numerics  # of the tests that depend on the instruction set

every_length = pytest.mark.parametrize("lengths", LENGTHS, ids=lambda n: f"{len(n)}rows{max(n)}steps")


def by_groups(run, module, x, state, lengths, groups):
    """Each group of rows of one length by itself, put together as a padded batch.

    `run` takes rows without padding, time first, and states.
    """
    x = x.transpose(0, 1) if module.batch_first else x
    y, finals = [], [[] for _ in state]
    for rows in groups:
        length, own = lengths[rows[0]], [h[:, rows] for h in state]
        if length == 0:
            width = module.hidden_size * (2 if module.bidirectional else 1)
            out, *last = x.new_zeros(0, len(rows), width), *own
        else:
            out, *last = run(x[:length, rows], own)
        y.append(nn.functional.pad(out, (0, 0, 0, 0, 0, len(x) - length)))
        for column, final in zip(finals, last, strict=True):
            column.append(final)
    inverse = torch.tensor([row for rows in groups for row in rows]).argsort()
    y, *finals = (torch.cat(parts, 1)[:, inverse] for parts in (y, *finals))
    return [y.transpose(0, 1) if module.batch_first else y, *finals]


def by_rows(run, module, x, state, lengths):
    return by_groups(run, module, x, state, lengths, [[row] for row in range(len(lengths))])


def by_lengths(run, module, x, state, lengths):
    """Rows of the same length together, which saves most calls of the formula."""
    groups = [[row for row, n in enumerate(lengths) if n == length] for length in sorted({*lengths})]
    return by_groups(run, module, x, state, lengths, groups)


def gradients(outputs, leaves):
    seed(5)
    weights = [torch.randn(o.shape, dtype=torch.float64).to(o.dtype) for o in outputs]
    loss = sum((o * w).sum() for o, w in zip(outputs, weights, strict=True))
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, leaves, strict=True)]


@cache
def truth(cell, options, lengths, dtype):
    """A problem's inputs, and by the formula in float64 the outputs and all gradients."""
    module = make(rnnfast, cell, 5, 17, dtype=dtype, **dict(options))
    x, state = problem(cell, module, lengths)
    exact = module.double()

    def formula(x, alone):
        y, h, c = reference.stack(cell, exact, x, alone[0], alone[-1])
        return [y, h, c][: 2 + CELLS[cell].has_c]

    there = [t.detach().double().requires_grad_() for t in (x, *state)]
    outputs = by_lengths(formula, exact, there[0], there[1:], lengths)
    return x, state, [*outputs, *gradients(outputs, [*there, *exact.parameters()])]


@numerics
@every_cell
@every_stack
@every_length
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_against_the_formula(cell, dtype, options, lengths):
    """Outputs and gradients of every kind."""
    module = make(rnnfast, cell, 5, 17, dtype=dtype, **options)
    x, state, want = truth(cell, (*options.items(),), (*lengths,), dtype)
    y, final = module(x, hx(cell, state), lengths=torch.tensor(lengths))
    got = [y, *flatten(final)]
    got += gradients(got, [x, *state, *module.parameters()])
    scale = max(*lengths, 1)  # the weights' gradients are sums over the steps
    tolerance = {name: value * scale for name, value in CLOSE[dtype].items()}
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b.to(dtype), **tolerance)


@cache
def many_rows(cell, options, longest):
    """A module, its inputs, and by the formula the gradients of all of them."""
    module = make(rnnfast, cell, 5, dtype=torch.float64, **dict(options))
    distinct = torch.randint(1, longest + 1, (7,))
    lengths = distinct[torch.randint(7, (19,))] if longest < 600 else torch.tensor([0] * 8 + [600])
    x, state = problem(cell, module, lengths.tolist())

    def formula(x, alone):
        y, h, c = reference.stack(cell, module, x, alone[0], alone[-1])
        return [y, h, c][: 2 + CELLS[cell].has_c]

    outputs = by_lengths(formula, module, x, state, lengths.tolist())
    return module, lengths, x, state, gradients(outputs, [x, *state, *module.parameters()])


@numerics
@every_cell
@pytest.mark.parametrize("options", [*STACKS, {"hidden_size": 320}], ids=str)
@pytest.mark.parametrize("packs", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("longest", [90, 600], ids=["many rows", "one row"])
def test_groups_of_rows(cell, options, packs, longest):
    """Backward runs many rows in two groups, unless the weights are large; one of them may be empty."""
    if packs and longest == 600:
        pytest.skip("torch packs no row of length 0")
    options = {"hidden_size": 17} | options
    module, lengths, x, state, want = many_rows(cell, (*options.items(),), longest)
    y, final = module(x, hx(cell, state), lengths=lengths)
    if packs:
        given = pack_padded_sequence(x, lengths, module.batch_first, enforce_sorted=False)
        y, final = module(given, hx(cell, state))
        y = pad_packed_sequence(y, module.batch_first, total_length=int(lengths.max()) + 2)[0]
    got = gradients([y, *flatten(final)], [x, *state, *module.parameters()])
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
    for t in (y, results[0][1 + len(state)]):
        for row, length in zip(t if module.batch_first else t.transpose(0, 1), lengths, strict=True):
            assert not row[length:].any()


@numerics
@every_cell
@every_length
def test_threads_partitions_and_frozen_weights_change_no_bit(cell, lengths):
    module = make(rnnfast, cell, 30, 70, 2)
    x, state = problem(cell, module, lengths)
    reset = torch.rand(x.shape[:2]) < 0.2
    given = {"lengths": torch.tensor(lengths), "reset": reset}
    results = []
    for threads, way in ((1, "chosen"), (2, "rows"), (3, "rows"), (3, "units"), (2, "wavefront")):
        set_threads(threads)
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


@numerics
@pytest.mark.parametrize("hidden", [70, 320])  # with and without two groups of rows
@every_cell
def test_both_directions_at_once(cell, hidden):
    """Each with a gradient of the input of its own, which are added up."""
    module = make(rnnfast, cell, 40, hidden, bidirectional=True)
    lengths = torch.randint(0, 60, (20,))
    x, state = problem(cell, module, lengths.tolist())
    results = []
    for threads, way in ((1, "one"), (2, "directions"), (3, "directions")):
        set_threads(threads)
        _C.force_partition(way, oversubscribe=True)
        y, final = module(x, hx(cell, state), lengths=lengths)
        results.append(gradients([y, *flatten(final)], [x, *state, *module.parameters()]))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@numerics
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
    whole, _ = module.eval()(x, lengths=LENGTHS[0])
    for row, length in enumerate(LENGTHS[0]):
        assert not y[row, length:].any()
        assert y[row, :length].any()
        assert not torch.equal(y[row, :length], whole[row, :length])


@numerics
@every_cell
def test_derivatives(cell, isa):
    """The first and, in torch's operators alone, the second, by differences."""
    module = make(rnnfast, cell, 2, 3, 2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    state = flatten(states(cell, 4, 3, 3, dtype=torch.float64))
    leaves = (x, *(h.requires_grad_() for h in state))

    def function(x, *state):
        return flatten(module(x, hx(cell, state), lengths=[2, 4, 0]))

    assert gradcheck(function, leaves)
    if cell != "rnn_relu" and isa == _C.supported_isas()[0]:
        assert gradgradcheck(function, leaves, atol=1e-4)
