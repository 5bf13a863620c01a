"""Packed sequences and lengths= in torch.compile and torch.export."""

from __future__ import annotations

import io
from functools import partial

import pytest
import torch
from torch.export import Dim
from torch.library import opcheck
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnfast
from graphs import recorded, same
from reference import CELLS
from seeds import seed
from twins import OF_EACH_CLASS, flatten, make, states

every_cell = pytest.mark.parametrize("cell", OF_EACH_CLASS)
every_order = pytest.mark.parametrize("in_order", [False, True], ids=["unsorted", "sorted"])
every_way = pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])

STACK = {"num_layers": 2, "bidirectional": True}
BATCHES = [[3, 1, 7, 7, 2], [4, 6, 1], [5, 9], [2, 2, 2, 2], [1, 1, 3, 30, 2, 8]]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def packed(lengths, in_order=False, dtype=torch.float32):
    """A packed batch; one in order has no indices that say how many rows it has."""
    lengths = sorted(lengths, reverse=True) if in_order else lengths
    x = torch.randn(max(lengths), len(lengths), 5, dtype=dtype)
    return pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=in_order)


def padded(lengths, batch_first=False):
    """A padded batch with NaN past the ends, and two more steps than the longest row."""
    x = torch.randn(max(lengths) + 2, len(lengths), 5)
    for row, length in enumerate(lengths):
        x[length:, row] = torch.nan
    return (x.transpose(0, 1) if batch_first else x), torch.tensor(lengths)


def tensors(out):
    """As flatten, with what a PackedSequence may lack."""
    if isinstance(out, tuple | list):
        return [t for part in out for t in tensors(part)]
    return [] if out is None else [out]


def agree(compiled, module, calls, x_of=lambda args: args[0].data):
    """The bits of the eager calls: outputs and gradients, with gradients and without."""
    for args in calls:
        x = x_of(args).requires_grad_()
        leaves, results = [x, *module.parameters()], []
        for run in compiled:
            seed(1)  # the same dropout masks
            out = tensors(run(*args))
            loss = sum(o.square().sum() for o in out if o.is_floating_point())
            results += [(*out, *torch.autograd.grad(loss, leaves))]
            with torch.no_grad():
                seed(1)
                same(tensors(run(*args)), out)
        same(*results)


def pair(run, backend="aot_eager", **options):
    """The compiled function and itself, the backend, and the names in its graphs."""
    backend, names = recorded(backend)
    compiled = torch.compile(run, backend=backend, **{"fullgraph": True, **options})
    return (compiled, run), backend, names


@every_cell
@every_order
@pytest.mark.parametrize("hx", [False, True], ids=["", "hx"])
def test_one_graph_for_all_batches(cell, in_order, hx):
    """In each mode, with gradients and without, one graph for the first sizes and one for any."""
    module = make(rnnfast, cell, 5, 17, **STACK)
    both, backend, names = pair(module)
    calls = [(packed(lengths, in_order),) for lengths in BATCHES]
    if hx:
        calls = [(*args, states(cell, 4, len(n), 17)) for args, n in zip(calls, BATCHES, strict=True)]
    agree(both, module, calls)
    assert all("rnnfast.stack" in name for name in names())
    assert len(names()) == backend.frame_count <= 4


@every_order
def test_projections_and_dropout_between_layers(in_order):
    module = rnnfast.LSTM(5, 17, 3, proj_size=7, dropout=0.4, bidirectional=True)
    both, backend, names = pair(module)
    agree(both, module, [(packed(lengths, in_order),) for lengths in BATCHES])
    assert len(names()) == 3 * backend.frame_count <= 12


@every_order
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("alike", [False, True], ids=["padded", "packed"])
def test_resets_and_cells(in_order, batch_first, alike):
    module = rnnfast.LSTM(5, 17, 2, bidirectional=True, batch_first=batch_first)

    def run(sequence, reset):
        return module(sequence, reset=reset, return_cell_states=True)

    calls = []
    for lengths in BATCHES:
        sequence = packed(lengths, in_order)
        steps = len(sequence.batch_sizes)
        shape = (len(lengths), steps) if batch_first else (steps, len(lengths))
        rows = sequence._replace(data=torch.rand(len(sequence.data)) < 0.4)
        calls.append((sequence, rows if alike else torch.rand(shape) < 0.4))
    both, backend, _ = pair(run)
    agree(both, module, calls)
    assert backend.frame_count <= 4


@pytest.mark.parametrize(("cell", "batch_first"), [*((c, False) for c in CELLS), ("lstm", True)])
def test_lengths(cell, batch_first):
    """One graph of any lengths, with rows of length 0 among them."""
    module = make(rnnfast, cell, 5, 17, batch_first=batch_first, **STACK)

    def run(x, lengths, reset, hx):
        return module(x, hx, lengths=lengths, reset=reset)

    calls = []
    for lengths in [*BATCHES, [0, 3, 0, 9]]:
        x, n = padded(lengths, batch_first)
        calls.append((x, n, torch.rand(x.shape[:2]) < 0.4, states(cell, 4, len(lengths), 17)))
    both, backend, names = pair(run)
    agree(both, module, calls, lambda args: args[0])
    assert len(names()) == backend.frame_count <= 4


def test_inductor():
    """What it makes of sizes that are data."""
    module = rnnfast.LSTM(5, 17, 2, bidirectional=True)

    def run(x, lengths, reset):
        return module(x, lengths=lengths, reset=reset, return_cell_states=True)

    both, _, _ = pair(module, "inductor")
    agree(both, module, [(packed(lengths, in_order=True),) for lengths in BATCHES[:3]])
    both, _, _ = pair(run, "inductor")
    batches = [padded(lengths) for lengths in BATCHES[:3]]
    calls = [(x, lengths, torch.rand(x.shape[:2]) < 0.4) for x, lengths in batches]
    agree(both, module, calls, lambda args: args[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    module = rnnfast.GRU(5, 17, dtype=dtype)
    both, _, _ = pair(module)
    agree(both, module, [(packed(BATCHES[0], dtype=dtype),)])


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_autocast(cell):
    """An LSTM's dtype then depends on whether its rows differ in length, which no graph knows."""
    module = make(rnnfast, cell, 5, 17)
    both, _, _ = pair(module)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        if cell == "lstm":
            with pytest.raises(Exception, match="data-dependent"):
                both[0](packed(BATCHES[0]))
            both, _, _ = pair(module, fullgraph=False)
        for lengths in (BATCHES[0], BATCHES[3]):
            args = packed(lengths)
            same(*(tensors(run(args)) for run in both))


# Dynamo hides this warning of its own, but not where warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("kind", ["packed", "lengths"])
def test_without_fullgraph(kind):
    """Dynamo then takes no sizes from data, as batch_sizes are: it breaks the graph there."""
    module = rnnfast.GRU(5, 17, 2, bidirectional=True)
    if kind == "packed":
        both, _, names = pair(module, fullgraph=False)
        agree(both, module, [(packed(lengths, in_order=True),) for lengths in BATCHES])
    else:
        both, _, names = pair(lambda x, lengths: module(x, lengths=lengths), fullgraph=False)
        agree(both, module, [padded(lengths) for lengths in BATCHES], lambda args: args[0])
    assert names()


BAD_SIZES = {
    "too few rows": ([3, 1, 1], r"x has shape \(6, 5\); expected \(5, 5\)"),
    "too many rows": ([3, 2, 2], r"x has shape \(6, 5\); expected \(7, 5\)"),
    "growing": ([2, 3, 1], "never grow; entry 1 is 3"),
    "zero": ([3, 3, 0], "must be positive and never grow; entry 2 is 0"),
    "negative": ([4, 3, -1], "must be positive and never grow; entry 2 is -1"),
    "huge": ([2**62, 2**62, 2**62], "must be positive and never grow; entry 1 is 4611686018427387904"),
}


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("bad", BAD_SIZES)
def test_bad_batch_sizes_are_refused_when_it_runs(bad, backend):
    """Forward and, since it may have been changed in the meantime, backward."""
    module = rnnfast.GRU(5, 17, 2, bidirectional=True)
    both, _, _ = pair(module, backend)
    sizes, message = BAD_SIZES[bad]
    good, x = torch.tensor([3, 2, 1]), torch.randn(6, 5, requires_grad=True)
    y, _ = both[0](PackedSequence(x, good))
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=message):
            both[0](PackedSequence(x, torch.tensor(sizes)))
    good.data.copy_(torch.tensor(sizes))
    with pytest.raises((RuntimeError, ValueError), match=message.replace("x has", ".* has")):
        y.data.sum().backward()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_other_numbers_of_rows_are_refused(backend):
    """Where sorted_indices, hx or reset= have others than batch_sizes."""
    module = rnnfast.GRU(5, 17)
    data, sizes, two = torch.randn(6, 5), torch.tensor([3, 2, 1]), torch.tensor([0, 1])
    compiled = torch.compile(module, fullgraph=True, backend=backend, dynamic=True)
    for reset in (None, torch.zeros(3, 2, dtype=torch.bool)):
        with pytest.raises(RuntimeError, match="batch_sizes begins with"):
            compiled(PackedSequence(data, sizes, two, two), reset=reset)
    with pytest.raises(RuntimeError, match=r"h0 has shape \(1, 2, 17\); expected \(1, 3, 17\)"):
        compiled(PackedSequence(data, sizes), torch.zeros(1, 2, 17))
    for rows in (2, 4):
        with pytest.raises(RuntimeError, match="reset has not the number of rows"):
            compiled(PackedSequence(data, sizes), reset=torch.zeros(3, rows, dtype=torch.bool))
    other = PackedSequence(torch.zeros(6, dtype=torch.bool), torch.tensor([2, 2, 2]))
    with pytest.raises(RuntimeError, match="not one packed as input is"):
        compiled(PackedSequence(data, sizes), reset=other)


BAD_LENGTHS = {
    "too long": ([3, 1, 8], r"between 0 and the 7 steps of the input, but lengths\[2\] is 8"),
    "negative": ([3, -1, 7], r"lengths\[1\] is -1"),
}


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("bad", BAD_LENGTHS)
def test_bad_lengths_are_refused_when_it_runs(bad, backend):
    module, x = rnnfast.GRU(5, 17), torch.randn(7, 3, 5)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    compiled(x, lengths=torch.tensor([1, 7, 2]))
    lengths, message = BAD_LENGTHS[bad]
    with pytest.raises(RuntimeError, match=message):
        compiled(x, lengths=torch.tensor(lengths))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_lengths_may_change_after_the_call(backend):
    """As in eager calls. Inductor removes the copy, and torch refuses the change."""
    module, x = rnnfast.GRU(5, 7), torch.randn(4, 3, 5, requires_grad=True)
    grads = []
    for run in (torch.compile(module, backend=backend), module):
        lengths = torch.tensor([4, 2, 0])
        y, _ = run(x, lengths=lengths)
        lengths.fill_(3)
        grads.append(torch.autograd.grad(y.square().sum(), x)[0])
    same(*grads)


def test_lengths_of_another_shape_are_refused():
    """Before they become an index."""
    compiled = torch.compile(rnnfast.GRU(5, 17), backend="eager", fullgraph=True)
    for lengths in ([3, 7], [3, 7, 7, 7], [[3, 1, 7]]):
        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"lengths (has|must have)"):
            compiled(torch.randn(7, 3, 5), lengths=torch.tensor(lengths))


@every_cell
def test_opcheck(cell):
    """Of the operator and of its backward, with a batch that is packed."""
    module = make(rnnfast, cell, 5, 17, **STACK)
    x, sizes, *_ = packed([4, 6, 1])
    has_c = CELLS[cell].has_c
    h = torch.randn(4, 3, 17, requires_grad=True)
    weights = list(module.parameters())
    for h0, reset in ((None, None), (h, torch.rand(11) < 0.4)):
        c0, cells = (h0 if has_c else None), has_c and reset is not None
        config = module._config(cell_states=cells)
        args = (x.clone().requires_grad_(), h0, c0, weights, sizes, reset, *config, 3, True)
        assert set(opcheck(torch.ops.rnnfast.stack.default, args).values()) == {"SUCCESS"}
        y, h_n, _, every_c, saved = torch.ops.rnnfast.stack.default(*args)
        left = [[t.detach() for t in given] for given in (weights, (y, saved))]
        inputs = (x, *(t if t is None else t.detach() for t in (h0, c0)), left[0], sizes, reset)
        grads = (torch.randn_like(y), torch.randn_like(h_n), None, every_c.detach() if cells else None)
        wanted = [True, h0 is not None, c0 is not None, *(True for _ in weights)]
        args = (*inputs, *config, *left[1], *grads, wanted)
        assert set(opcheck(torch.ops.rnnfast.stack_backward.default, args).values()) == {"SUCCESS"}


def reloaded(program):
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


class FromFields(torch.nn.Module):
    """With a PackedSequence for input torch neither saves a program nor lets its sizes vary."""

    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, data, batch_sizes, sorted_indices, unsorted_indices):
        y, state = self.rnn(PackedSequence(data, batch_sizes, sorted_indices, unsorted_indices))
        return y.data, state


class Padded(FromFields):
    def forward(self, x, lengths):
        return self.rnn(x, lengths=lengths)


@every_way
@every_order
@every_cell
def test_export(cell, in_order, strict):
    """Of a PackedSequence; and from its fields, of any batch and lengths, saved and loaded."""
    module = make(rnnfast, cell, 5, 17, **STACK)
    example = packed([4, 6, 1], in_order)
    program = torch.export.export(module, (example,), strict=strict).module()
    same(*(tensors(run(example)) for run in (program, module)))
    net, dims = FromFields(module), ({0: Dim("rows")}, {0: Dim("steps")}, {0: Dim("batch")})
    dims = (*dims[:2], None, None) if in_order else (*dims, dims[-1])
    program = reloaded(torch.export.export(net, tuple(example), dynamic_shapes=dims, strict=strict))
    for lengths in BATCHES:
        given = packed(lengths, in_order)
        same(*(flatten(run(*given)) for run in (program, net)))


@every_way
def test_export_of_lengths(strict):
    net, dims = Padded(rnnfast.LSTM(5, 17, 2, bidirectional=True)), (Dim("steps"), Dim("batch"))
    shapes = ({0: dims[0], 1: dims[1]}, {0: dims[1]})
    program = torch.export.export(net, padded([4, 6, 1]), dynamic_shapes=shapes, strict=strict)
    program = reloaded(program)
    for lengths in [*BATCHES, [0, 3, 0, 9]]:
        given = padded(lengths)
        same(*(flatten(run(*given)) for run in (program, net)))
    for lengths, message in BAD_LENGTHS.values():
        with pytest.raises(RuntimeError, match=message):
            program(torch.randn(7, 3, 5), torch.tensor(lengths))


@every_cell
def test_derivatives_of_programs(cell):
    """The second ones, those under a transform, and the first of what was exported without."""
    module = make(rnnfast, cell, 5, 7)
    x, *others = packed([4, 6, 1])
    x.requires_grad_()
    eager = FromFields(module)
    with torch.no_grad():
        exported = torch.export.export(eager, (x.detach(), *others)).module()

    def loss(run, x):
        return run(x, *others)[0].square().sum()

    def second(run):
        (grad,) = torch.autograd.grad(loss(run, x), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)

    same(*(torch.autograd.grad(loss(run, x), x) for run in (exported, eager)))
    compiled = torch.compile(eager, backend="eager", fullgraph=True)
    want = second(eager)
    for run in (exported, compiled):
        torch.testing.assert_close(second(run), want)
    for transform in (torch.func.grad, torch.func.jacfwd):
        got, want = (transform(partial(loss, run))(x.detach()) for run in (exported, eager))
        torch.testing.assert_close(got, want)
