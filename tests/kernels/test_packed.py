"""Rows of different lengths: PackedSequence."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import reference
import rnnfast
from packed import LENGTHS, gradients, packed, run_packed, run_rows
from reference import CELLS
from seeds import seed
from threads import set_threads
from twins import CLOSE, LAYERS, flatten, make, states, twins

numerics = pytest.mark.numerics  # of the tests that depend on the instruction set

every_cell = pytest.mark.parametrize("cell", CELLS)
every_layer = pytest.mark.parametrize("cell", LAYERS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])

STACKS = [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False, "bidirectional": True}]
every_stack = pytest.mark.parametrize("options", STACKS, ids=str)

every_length = pytest.mark.parametrize("lengths", LENGTHS, ids=lambda n: f"{len(n)}rows{max(n)}steps")


def problem(cell, module, lengths):
    """A padded batch with NaN past the ends, and states."""
    dtype = module.weight_ih_l0.dtype
    x = torch.randn(max(lengths), len(lengths), module.input_size, dtype=dtype)
    for row, length in enumerate(lengths):
        x[length:, row] = torch.nan
    count = module.num_layers * (2 if module.bidirectional else 1)
    return x, states(cell, count, len(lengths), module.hidden_size, dtype=dtype)


@numerics
@every_cell
@every_dtype
@every_stack
@every_length
def test_against_the_formula(cell, dtype, options, lengths):
    """Outputs and gradients of every kind; the truth is the formula in float64, row by row."""
    module = make(rnnfast, cell, 5, 17, dtype=dtype, **options)
    exact = make(rnnfast, cell, 5, 17, dtype=dtype, **options).double()
    x, state = problem(cell, module, lengths)
    results = []
    for m in (module, exact):
        here = x.to(m.weight_ih_l0.dtype).requires_grad_()
        given = tuple(h.to(here.dtype).detach().requires_grad_() for h in flatten(state))
        given = given if CELLS[cell].has_c else given[0]
        if m is module:
            outputs = run_packed(m, here, given, lengths)
        else:

            def formula(x, alone):
                y, h, c = reference.stack(cell, exact, x, alone[0], alone[-1])
                return [y, h, c][: 2 + CELLS[cell].has_c]

            outputs = run_rows(formula, here, given, lengths)
        results.append([*outputs, *gradients(m, outputs, here, given)])
    scale = max(lengths)  # the weights' gradients are sums over the steps
    tolerance = {name: value * scale for name, value in CLOSE[dtype].items()}
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want.to(dtype), **tolerance)


@numerics
@every_layer
@every_stack
def test_against_torch(cell, options):
    """The PackedSequence that comes back is torch's in every field."""
    ours, theirs = twins(cell, 5, 17, **options)
    x, state = problem(cell, ours, LENGTHS[0])
    for args in ((packed(x, LENGTHS[0]),), (packed(x, LENGTHS[0]), state)):
        got, want = ours(*args), theirs(*args)
        assert isinstance(got[0], PackedSequence)
        for field in ("batch_sizes", "sorted_indices", "unsorted_indices"):
            assert torch.equal(getattr(got[0], field), getattr(want[0], field))
        for a, b in zip(flatten(got[1]), flatten(want[1]), strict=True):
            torch.testing.assert_close(a, b, **CLOSE[b.dtype])
        torch.testing.assert_close(got[0].data, want[0].data, **CLOSE[want[0].data.dtype])
    in_order = pack_padded_sequence(x[:, :1], torch.tensor([3]))  # and one without indices
    assert ours(in_order)[0].sorted_indices is theirs(in_order)[0].sorted_indices is None


@numerics
@every_cell
@every_dtype
@every_stack
@every_length
def test_bits_of_a_row_alone(cell, dtype, options, lengths):
    """Packed or alone, the same bits: outputs, final states, and gradients of the row's inputs."""
    module = make(rnnfast, cell, 5, 17, dtype=dtype, **options)
    x, state = problem(cell, module, lengths)

    def alone(x, given):
        y, final = module(x, tuple(given) if CELLS[cell].has_c else given[0])
        return [y, *flatten(final)]

    results = []
    for run in (run_packed, run_rows):
        here = x.clone().requires_grad_()
        outputs = run(module if run is run_packed else alone, here, state, lengths)
        (grad,) = torch.autograd.grad(outputs[0].square().sum(), here)
        results.append([*outputs, grad])
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


@numerics
@every_cell
@pytest.mark.parametrize("options", STACKS[:2], ids=str)
def test_bits_of_any_number_of_threads(cell, options):
    module = make(rnnfast, cell, 30, 70, **options)
    lengths = [1 + (7 * row) % 19 for row in range(40)]
    x, state = problem(cell, module, lengths)
    x.requires_grad_()
    results = []
    for threads in (1, 2, 3):
        set_threads(threads)
        outputs = run_packed(module, x, state, lengths)
        loss = sum(o.square().sum() for o in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, [x, *module.parameters()])])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@numerics
@every_cell
def test_gradcheck(cell):
    module = make(rnnfast, cell, 3, 4, 2, bidirectional=True, dtype=torch.float64)
    lengths = [2, 4, 1]
    x = torch.randn(4, 3, 3, dtype=torch.float64, requires_grad=True)
    state = states(cell, 4, 3, 4, dtype=torch.float64)
    leaves = [h.clone().requires_grad_() for h in flatten(state)]

    def function(x, *leaves):
        given = leaves if CELLS[cell].has_c else leaves[0]
        return tuple(run_packed(module, x, given, lengths))

    assert gradcheck(function, (x, *leaves))


def by_hand(rows, batch_sizes, dtype=torch.int64, features=5):
    """A PackedSequence as nobody's packing would make it."""
    return PackedSequence(torch.randn(rows, features), torch.tensor(batch_sizes, dtype=dtype))


BAD_PACKED = {
    "too few rows": lambda: by_hand(5, [3, 2, 1]),
    "too many rows": lambda: by_hand(7, [3, 2, 1]),
    "no rows": lambda: by_hand(0, [3, 2, 1]),
    "no steps": lambda: by_hand(0, []),
    "no steps, some rows": lambda: by_hand(6, []),
    "growing": lambda: by_hand(6, [1, 2, 3]),
    "growing again": lambda: by_hand(6, [3, 1, 2]),
    "zero": lambda: by_hand(3, [3, 0, 0]),
    "zero first": lambda: by_hand(0, [0]),
    "negative": lambda: by_hand(4, [3, 2, -1]),
    "huge": lambda: by_hand(3, [2**62, 2**62, 2**62, 2**62, 3]),
    "input size": lambda: by_hand(6, [3, 2, 1], features=4),
    "2-D sizes": lambda: by_hand(6, [[3, 2, 1]]),
    "scalar size": lambda: by_hand(3, 3),
    "int32": lambda: by_hand(6, [3, 2, 1], torch.int32),
    "float": lambda: by_hand(6, [3.0, 2.0, 1.0], torch.float32),
    "3-D data": lambda: PackedSequence(torch.randn(6, 1, 5), torch.tensor([3, 2, 1])),
    "1-D data": lambda: PackedSequence(torch.randn(6), torch.tensor([3, 2, 1])),
    "wrong order": lambda: PackedSequence(
        torch.randn(6, 5), torch.tensor([3, 2, 1]), torch.tensor([0, 1, 9]), torch.tensor([0, 1, 2])
    ),
}


@every_cell
@pytest.mark.parametrize("bad", BAD_PACKED)
@pytest.mark.parametrize("hx", [False, True], ids=["", "hx"])
def test_bad_packed_sequences(cell, bad, hx):
    """An exception or a finite answer of the right size: nothing is read that is not there."""
    module = make(rnnfast, cell, 5, 17, bidirectional=True)
    sequence = BAD_PACKED[bad]()
    args = (sequence, states(cell, 2, 3, 17)) if hx else (sequence,)
    try:
        y, _ = module(*args)
        y.data.sum().backward()
    except (ValueError, RuntimeError, TypeError, IndexError):
        return
    assert bad in ("int32", "zero", "zero first", "wrong order", "no rows", "too many rows")
    # torch computes the rows that the sizes name, and leaves the others out.
    assert y.data.shape == (6 if bad == "too many rows" else len(sequence.data), 34)
    assert y.data.isfinite().all()


@every_layer
@pytest.mark.numerics(dtype="bfloat16")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_threads_do_not_matter_in_inference(cell, dtype):
    """No barrier keeps two threads in the same chunk of steps: often, and with chunks of few steps."""
    module = make(rnnfast, cell, 16, 32, dtype=dtype)
    lengths = torch.randint(1, 60, (48,))
    x = packed(torch.randn(60, 48, 16, dtype=dtype), lengths.tolist())
    with torch.no_grad():
        want = module(x)[0].data
        for threads in (2, 3):
            torch.set_num_threads(threads)
            for _ in range(60):
                assert torch.equal(module(x)[0].data, want)


@every_layer
def test_dropout_between_layers_draws_torchs_masks(cell):
    modules = twins(cell, 5, 17, num_layers=3, dropout=0.5)
    x, state = problem(cell, modules[0], LENGTHS[0])
    outputs = []
    for module in modules:
        seed(1)
        outputs.append(module(packed(x, LENGTHS[0]), state)[0].data)
    torch.testing.assert_close(*outputs, **CLOSE[torch.float32])
