"""bfloat16 and float16: modules of these dtypes, and autocast on the CPU.

The truth is float64 on the same rounded inputs and weights. What a result may be off is a relative
error in norm: a rounding to bfloat16 alone is 2^-9 / sqrt(3) of it.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import reference
import rnnfast
from reference import CELLS
from seeds import seed
from threads import set_threads
from twins import LAYERS, flatten, make, states, torch_has_half_lstm, twins

BF16 = torch.bfloat16
ROUNDING = 2.0**-8

every_cell = pytest.mark.parametrize("cell", CELLS)
every_layer = pytest.mark.parametrize("cell", LAYERS)
every_suffix = pytest.mark.parametrize("suffix", ["", "Cell"])

# T, B, I, H: odd widths end in half a word; blocks and tiles that are full, and that are not.
SHAPES = [
    (3, 12, 1, 1),
    (1, 3, 5, 37),
    (1, 2, 64, 48),
    (1, 40, 33, 130),
    (7, 1, 16, 65),
    (9, 2, 17, 3),
    (30, 5, 6, 20),
    (5, 33, 130, 33),
    (70, 9, 3, 18),
]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "T{}B{}I{}H{}".format(*s))


def error(got, want):
    """Relative, in norm."""
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-6)).item()


def on_kernels(y):
    """That no other path computed it."""
    assert type(y.grad_fn).__name__ == "_StackBackward", y.grad_fn


def solve(module, x, hx, number=1):
    """Outputs, and the gradients of all leaves for random cotangents."""
    leaves = [x, *flatten(hx), *module.parameters()]
    for leaf in leaves:
        leaf.requires_grad_()
    out = flatten(module(x, hx))
    seed(number)
    cotangents = [torch.randn(o.shape).bfloat16().to(o.dtype) for o in out]
    return out, torch.autograd.grad(out, leaves, cotangents)


class OnOperators(torch.nn.Module):
    """A module of rnnfast on torch's operators, where torch.nn has no such cell."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x, hx):
        return self.module._run(x, hx, self.module._weights(), covered=None)


def copy(hx, dtype):
    cast = tuple(h.detach().to(dtype) for h in flatten(hx))
    return cast if isinstance(hx, tuple) else cast[0]


@pytest.mark.numerics(dtype="bfloat16")
@every_cell
@every_shape
@pytest.mark.parametrize("kind", ["", "stack", "projected"])
@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_is_as_near_to_the_truth_as_torch(cell, shape, kind):
    T, B, I, H = shape
    if kind == "projected" and (cell != "lstm" or H == 1):
        pytest.skip("only the LSTM has projections, to fewer than H")
    options = {
        "stack": {"num_layers": 2, "bidirectional": True},
        "projected": {"proj_size": (H + 1) // 2},
    }.get(kind, {})
    module = make(rnnfast, cell, I, H, dtype=BF16, **options)
    numbers = module.num_layers * (2 if module.bidirectional else 1)
    x, hx = torch.randn(T, B, I, dtype=BF16), states(cell, numbers, B, H, dtype=BF16)
    if kind == "projected":
        hx = (hx[0][..., : module.proj_size], hx[1])
    got, got_grads = solve(module, x.clone(), copy(hx, BF16))
    on_kernels(got[0])

    wide = make(rnnfast, cell, I, H, dtype=torch.float64, **options)
    wide.load_state_dict(module.state_dict())
    want, want_grads = solve(wide, x.double(), copy(hx, torch.float64))
    if CELLS[cell].in_torch:
        theirs = make(torch.nn, cell, I, H, dtype=BF16, **options)
        theirs.load_state_dict(module.state_dict())
    else:
        theirs = OnOperators(module)
    peer, peer_grads = solve(theirs, x.clone(), copy(hx, BF16))
    torchs = [error(a, b) for a, b in zip((*peer, *peer_grads), (*want, *want_grads), strict=True)]
    # The derivative of a ReLU jumps: where a rounding takes its argument past zero, a path is cut.
    jumps = 8 if cell == "rnn_relu" else 1
    for a, b, allowed in zip((*got, *got_grads), (*want, *want_grads), torchs, strict=True):
        assert a.dtype == BF16
        assert error(a, b) <= max(1.25 * allowed, 1.5 * ROUNDING) * jumps


@pytest.mark.numerics(dtype="bfloat16")
def test_sums_are_in_float32():
    """1 + 2^-8 is 1 in bfloat16: a sum of 4096 such terms would end there."""
    module = rnnfast.RNN(4096, 16, nonlinearity="relu", bias=False, dtype=BF16)
    torch.nn.init.constant_(module.weight_ih_l0, 2.0**-8)
    for rows in (1, 40):
        y, _ = module(torch.ones(1, rows, 4096, dtype=BF16))
        assert (y == 16).all()
    x = torch.ones(4096, 1, 16, dtype=BF16)
    module = rnnfast.RNN(16, 16, nonlinearity="relu", bias=True, dtype=BF16)
    for weight in (module.weight_ih_l0, module.weight_hh_l0, module.bias_hh_l0):
        torch.nn.init.zeros_(weight)
    torch.nn.init.ones_(module.bias_ih_l0)
    y, _ = module(x)
    grads = torch.autograd.grad(y.sum() * 2.0**-8, list(module.parameters()))
    assert (grads[0] == 16).all()
    assert (grads[2] == 16).all()


@pytest.mark.numerics(dtype="bfloat16")
def test_the_cell_state_is_in_float32():
    """It grows by 2^-10 at each step; in bfloat16 it would end at 2^-2."""
    module = rnnfast.LSTM(1, 5, dtype=BF16)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        i, f, g, _ = module.bias_ih_l0.chunk(4)
        i.fill_(20)
        f.fill_(20)
        g.fill_(2.0**-10)
    _, (_, c) = module(torch.zeros(1024, 1, 1, dtype=BF16))
    assert (c.float() - 1).abs().max() < 2.0**-8


@pytest.mark.numerics(dtype="bfloat16")
@every_cell
@pytest.mark.parametrize("shape", [(20, 33, 130, 130), (12, 9, 17, 70), (5, 1, 65, 257)], ids=str)
def test_threads_do_not_matter(cell, shape):
    T, B, I, H = shape
    module = make(rnnfast, cell, I, H, num_layers=2, bidirectional=True, dtype=BF16)
    x, hx, results = torch.randn(T, B, I, dtype=BF16), states(cell, 4, B, H, dtype=BF16), []
    for threads in (1, 2, 3):
        set_threads(threads)
        out, grads = solve(module, x.clone(), copy(hx, BF16))
        results.append((*out, *grads))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.numerics(dtype="bfloat16")
@every_cell
@pytest.mark.parametrize("sizes", [(3, 5), (17, 33), (130, 130)], ids=str)
def test_other_rows_do_not_matter(cell, sizes):
    """Neither how many there are nor what they hold, NaN included."""
    module = make(rnnfast, cell, *sizes, dtype=BF16)
    x = torch.randn(4, 40, sizes[0], dtype=BF16)
    whole = module(x)[0]
    for rows in (slice(0, 1), slice(0, 2), slice(0, 7), slice(0, 33), slice(39, 40)):
        assert torch.equal(module(x[:, rows])[0], whole[:, rows])
    for poison in (float("nan"), float("inf")):
        x[2, 4] = poison
        y = module(x)[0]
        others = torch.arange(40) != 4
        assert torch.equal(y[:, others], whole[:, others])


@pytest.mark.numerics(dtype="bfloat16")
@every_cell
def test_streamed_step_by_step(cell):
    """The state that is handed over is h alone: the same bits. The LSTM's c is rounded there."""
    module = make(rnnfast, cell, 17, 65, dtype=BF16)
    x, hx, y = torch.randn(12, 3, 17, dtype=BF16), None, []
    whole = module(x)[0]
    with torch.no_grad():
        for step in x.split(1):
            out, hx = module(step, hx)
            y.append(out)
    if CELLS[cell].has_c:
        assert error(torch.cat(y), whole.double()) < 2 * ROUNDING
    else:
        assert torch.equal(torch.cat(y), whole)


@pytest.mark.numerics(dtype="bfloat16")
@every_cell
@pytest.mark.parametrize("hidden", [20, 33])
def test_packed_is_padded(cell, hidden):
    module = make(rnnfast, cell, 5, hidden, bidirectional=True, dtype=BF16)
    lengths = torch.tensor([9, 9, 6, 5, 1])
    x = torch.randn(9, 5, 5, dtype=BF16)
    packed, h_n = module(pack_padded_sequence(x, lengths))
    y = pad_packed_sequence(packed)[0]
    for row, length in enumerate(lengths):
        alone, h = module(x[:length, row : row + 1])
        assert torch.equal(y[:length, row], alone[:, 0])
        assert all(
            torch.equal(a[:, row], b[:, 0]) for a, b in zip(flatten(h_n), flatten(h), strict=True)
        )
    results = []
    for lengths_given in (None, torch.full((5,), 9)):
        module.zero_grad()
        y, _ = module(x, lengths=lengths_given)
        y.float().square().sum().backward()
        results.append([p.grad.clone() for p in module.parameters()])
    for a, b in zip(*results, strict=True):
        assert error(a, b.double()) <= ROUNDING


@every_layer
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_few_steps_and_frozen_weights(cell, steps):
    """Weights turned in registers or packed: the same bits."""
    module = make(rnnfast, cell, 33, 65, dtype=BF16)
    x = torch.randn(steps, 4, 33, dtype=BF16)
    with torch.no_grad():
        want = module(x)[0]
        with rnnfast.frozen(module):
            for _ in range(2):
                assert torch.equal(module(x)[0], want)


def autocast_cases():
    dtypes = (torch.float32, BF16, torch.float16)
    yield from itertools.product(dtypes, dtypes, (None, *dtypes), dtypes[1:])


@every_layer
@pytest.mark.parametrize("kind", ["", "stack", "packed", "packed evenly", "projected", "Cell"])
@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_autocast_gives_the_dtypes_that_torch_gives(cell, kind):
    if kind == "projected" and cell != "lstm":
        pytest.skip("only the LSTM has projections")
    if cell == "lstm" and kind in ("", "stack", "packed evenly") and not torch_has_half_lstm():
        pytest.skip("torch has no LSTM in half precision on this processor")
    suffix = "Cell" if kind == "Cell" else ""
    options = {"stack": {"num_layers": 2}, "projected": {"proj_size": 3}}.get(kind, {})
    ours, theirs = twins(cell, 5, 17, suffix=suffix, **options)
    compared = 0
    for weights, dtype, state, lower in autocast_cases():
        x = torch.randn(*(() if suffix else (4,)), 3, 5).to(dtype)
        hx = None
        if state is not None:
            shape = (3, 17) if suffix else (options.get("num_layers", 1), 3, 17)
            hx = states(cell, *shape)
            hx = copy(hx, state)
            if kind == "projected":
                hx = (hx[0][..., :3], hx[1])
        given = x
        if "packed" in kind:  # rows of one length take torch through oneDNN again
            given = pack_padded_sequence(x, [4, 3, 1] if kind == "packed" else [4, 4, 4])
        with torch.autocast("cpu", lower):
            try:
                want = theirs.to(weights)(given, hx)
            except RuntimeError:  # torch cannot: float16 through oneDNN, bfloat16 beside float16
                continue
            got = ours.to(weights)(given, hx)
        compared += 1
        if "packed" in kind:
            got, want = ((out[0].data, out[1]) for out in (got, want))
        for a, b in zip(flatten(got), flatten(want), strict=True):
            assert a.dtype == b.dtype, (weights, dtype, state, lower)
            assert error(a, b.double()) < 4 * ROUNDING, (weights, dtype, state, lower)
    assert compared >= 10


@every_layer
@every_suffix
def test_autocast_runs_on_the_kernels(cell, suffix, monkeypatch):
    """And trains parameters in float32."""
    ours, _ = twins(cell, 5, 17, suffix=suffix)
    ran = []
    forward = rnnfast.stack.ops.forward

    def recorded(config, inputs, *rest, **options):
        ran.append(inputs.x.dtype)
        return forward(config, inputs, *rest, **options)

    monkeypatch.setattr(rnnfast.stack.ops, "forward", recorded)
    x = torch.randn(*(() if suffix else (4,)), 3, 5)
    for lower, computes in ((BF16, BF16), (torch.float16, torch.float32)):
        ran.clear()
        with torch.autocast("cpu", lower):
            out = flatten(ours(x))
        assert ran == [computes]
        sum(o.float().sum() for o in out).backward()
        assert all(p.grad.dtype == torch.float32 for p in ours.parameters())
    with torch.autocast("cpu", BF16):  # which does not touch float64
        ran.clear()
        assert flatten(ours.double()(x.double()))[0].dtype == torch.float64
        assert ran == [torch.float64]


@every_cell
@every_suffix
def test_float16_is_computed_through_float32(cell, suffix):
    half = make(rnnfast, cell, 5, 17, suffix=suffix, dtype=torch.float16)
    wide = make(rnnfast, cell, 5, 17, suffix=suffix)
    wide.load_state_dict(half.state_dict())
    x = torch.randn(*(() if suffix else (4,)), 3, 5).half()
    for a, b in zip(flatten(half(x)), flatten(wide(x.float())), strict=True):
        assert torch.equal(a, b.half())
    weight = torch.randn_like(x)
    for module, given in ((half, x), (wide, x.float())):
        out = flatten(module(given))[0]
        (out.float() * weight.float().sum()).sum().backward()
    for a, b in zip(half.parameters(), wide.parameters(), strict=True):
        assert a.grad.dtype == torch.float16
        assert error(a.grad, b.grad.double()) < 2.0**-9


@every_layer
def test_dropout_draws_the_masks_that_torch_draws(cell):
    ours, theirs = twins(cell, 5, 17, num_layers=3, dropout=0.5, dtype=BF16)
    x = torch.randn(6, 3, 5, dtype=BF16)
    outputs = []
    for module in (ours, theirs):
        seed(3)
        outputs.append(module(x)[0])
    torch.testing.assert_close(*outputs, rtol=2**-5, atol=2**-6)


def test_double_backward_and_higher_derivatives():
    """Through torch's operators, in bfloat16 as in any dtype."""
    module = rnnfast.GRU(5, 17, dtype=BF16)
    x = torch.randn(4, 3, 5, dtype=BF16, requires_grad=True)
    (grad,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
    grad.square().sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().max() > 0


def test_mixed_dtypes_are_refused_as_torch_refuses_them():
    module = rnnfast.LSTM(5, 17, dtype=BF16)
    with pytest.raises(ValueError, match=r"RNN input dtype \(torch.float32\) does not match"):
        module(torch.randn(4, 3, 5))
    x = torch.randn(4, 3, 5, dtype=BF16)
    with pytest.raises(RuntimeError):
        module(x, (torch.zeros(1, 3, 17), torch.zeros(1, 3, 17)))


def test_reference_rounds_nothing():
    """The truth above is the formula, in float64."""
    module = rnnfast.LSTM(5, 17, dtype=torch.float64)
    x, zero = torch.randn(4, 3, 5, dtype=torch.float64), torch.zeros(1, 3, 17, dtype=torch.float64)
    want = reference.stack("lstm", module, x, zero, zero)[0]
    torch.testing.assert_close(module(x)[0], want, rtol=0, atol=1e-12)
