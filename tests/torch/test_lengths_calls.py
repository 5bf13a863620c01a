"""What `lengths=` takes, where it is refused, and under what else it works."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence
from torch.profiler import ProfilerActivity, profile

import rnnfast
from padded import LENGTHS, STACKS, every_cell, hx, problem
from rnnfast import _C
from rnnfast.stack import sequences
from twins import CLOSE, LAYERS, flatten, make


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
    "complex": ([3j, 1j, 7j], TypeError, "lengths must be integers, got torch.complex64"),
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


@pytest.mark.parametrize("batch_first", [False, True])
def test_resets_and_cells_by_packing(batch_first):
    module = make(rnnfast, "lstm", 5, 17, 2, bidirectional=True, batch_first=batch_first)
    x, state = problem("lstm", module, LENGTHS[4])
    reset = torch.rand(x.shape[:2]) < 0.4
    given = {"lengths": LENGTHS[4], "reset": reset, "return_cell_states": True}
    for options in (given, given | {"reset": None}):
        want = flatten(module(x, hx("lstm", state), **options))
        found = flatten(module(x.detach().as_subclass(Marked), hx("lstm", state), **options))
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a.as_subclass(torch.Tensor), b, **CLOSE[torch.float32])


def test_rows_of_length_0_by_packing_under_autocast():
    module = make(rnnfast, "rnn_tanh", 5, 17)
    x, (h,) = problem("rnn_tanh", module, [0, 3])
    with torch.autocast("cpu", torch.bfloat16):
        _, h_n = module(x.detach().as_subclass(Marked), h, lengths=[0, 3])
    assert h_n.dtype == torch.bfloat16
    assert torch.equal(h_n[:, 0].as_subclass(torch.Tensor), h[:, 0].bfloat16())


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
    x, _ = problem(cell, module, [int(length) for length in lengths], extra=0)  # NaN past the ends
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
