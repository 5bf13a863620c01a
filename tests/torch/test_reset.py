"""reset=, states that start over inside a sequence, and return_cell_states=, every cell state.

The truth is a Python loop over the steps, in float64, that multiplies the states by 1 - reset.
"""

from __future__ import annotations

import io
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import rnnfast
from reference import CELLS
from seeds import seed
from threads import set_threads
from twins import flatten, make, states

every_cell = pytest.mark.parametrize("cell", CELLS)
EXAMPLE = Path(__file__).parents[2] / "examples" / "reset.py"

STACKS = {
    "layer": {},
    "no bias": {"bias": False},
    "stack": {"num_layers": 2, "bidirectional": True},
    "batch first": {"batch_first": True, "num_layers": 2},
    "projected": {"proj_size": 4, "bidirectional": True},
}
every_stack = pytest.mark.parametrize("kind", STACKS)

# T, B, I, H
SHAPES = [(1, 3, 5, 7), (12, 1, 3, 33), (9, 4, 17, 20), (30, 20, 5, 130), (7, 40, 6, 18)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "T{}B{}I{}H{}".format(*s))


def module_of(cell, I, H, kind="layer", dtype=torch.float64, **options):
    if kind == "projected" and cell != "lstm":
        pytest.skip("only the LSTM has projections")
    return make(rnnfast, cell, I, H, dtype=dtype, **STACKS[kind], **options)


def problem(cell, module, T, B, share=0.3):
    """An input, states and resets, as the module takes them."""
    dtype = module.weight_ih_l0.dtype
    x = torch.randn(T, B, module.input_size, dtype=dtype)
    count = module.num_layers * (2 if module.bidirectional else 1)
    hx = states(cell, count, B, module.hidden_size, dtype=dtype)
    if module.proj_size:
        hx = (hx[0][..., : module.proj_size].contiguous(), hx[1])
    reset = torch.rand(T, B) < share
    if module.batch_first:
        x, reset = x.transpose(0, 1).contiguous(), reset.t().contiguous()
    return x, hx, reset


def by_loop(cell, module, x, hx, reset):
    """Outputs, final states and, where there are any, the last layer's cell states."""
    if module.batch_first:
        x, reset = x.transpose(0, 1), reset.t()
    step, keep = CELLS[cell].step, 1 - reset.to(x.dtype)[..., None]
    h0, c0 = hx if CELLS[cell].has_c else (hx, hx)
    h_n, c_n = [], []
    y = x
    for layer in range(module.num_layers):
        halves, cells = [], []
        for direction in range(2 if module.bidirectional else 1):
            suffix = f"_l{layer}" + "_reverse" * direction
            w_ih, w_hh = (getattr(module, name + suffix) for name in ("weight_ih", "weight_hh"))
            zero = w_ih.new_zeros(len(w_ih))
            b_ih, b_hh = (getattr(module, name + suffix, zero) for name in ("bias_ih", "bias_hh"))
            h, c = h0[len(h_n)], c0[len(h_n)]
            out, every_c = [None] * len(y), [None] * len(y)
            for t in range(len(y))[:: -1 if direction else 1]:
                h, c = keep[t] * h, keep[t] * c
                h, c = step(y[t], h, c, w_ih, w_hh, b_ih, b_hh)
                h = h @ getattr(module, "weight_hr" + suffix).T if module.proj_size else h
                out[t], every_c[t] = h, c
            halves.append(torch.stack(out))
            cells.append(torch.stack(every_c))
            h_n.append(h)
            c_n.append(c)
        y = torch.cat(halves, -1)
    outputs, cells = [y, torch.cat(cells, -1)], []
    if module.batch_first:
        outputs = [o.transpose(0, 1) for o in outputs]
    y, cells = outputs
    if not CELLS[cell].has_c:
        return [y, torch.stack(h_n)]
    return [y, torch.stack(h_n), torch.stack(c_n), cells]


def gradients(module, inputs, out):
    leaves = [*inputs, *module.parameters()]
    seed(3)
    cotangents = [torch.randn(o.shape, dtype=o.dtype) for o in out]
    return torch.autograd.grad(out, leaves, cotangents)


@pytest.mark.numerics
@every_cell
@every_stack
@every_shape
def test_is_the_loop(cell, kind, shape):
    T, B, I, H = shape
    module = module_of(cell, I, H, kind)
    x, hx, reset = problem(cell, module, T, B)
    inputs = [t.requires_grad_() for t in (x, *flatten(hx))]
    got = list(flatten(module(x, hx, reset=reset, return_cell_states=CELLS[cell].has_c)))
    assert type(got[0].grad_fn).__name__ == "_StackBackward"
    want = by_loop(cell, module, x, hx, reset)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    for a, b in zip(gradients(module, inputs, got), gradients(module, inputs, want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.numerics(dtype="bfloat16")
@every_cell
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reset_is_a_new_sequence(cell, dtype):
    """The same bits as two calls, the second without states; not even NaN passes the cut."""
    module = module_of(cell, 17, 65, dtype=dtype)
    x, hx, _ = problem(cell, module, 11, 5)
    reset = torch.zeros(11, 5, dtype=torch.bool)
    reset[4] = True
    (first, _), (second, last) = module(x[:4], hx), module(x[4:])
    x = x.clone().requires_grad_()
    y, final = module(x, hx, reset=reset)
    assert torch.equal(y, torch.cat([first, second]))
    assert all(torch.equal(a, b) for a, b in zip(flatten(final), flatten(last), strict=True))
    (grad,) = torch.autograd.grad(y[4:].sum(), x, retain_graph=True)
    assert (grad[:4] == 0).all()
    assert (grad[4:] != 0).any()
    poisoned = x.detach().clone()
    poisoned[2] = torch.nan
    poisoned.requires_grad_()
    y, _ = module(poisoned, hx, reset=reset)
    assert torch.equal(y[4:], second)
    (grad,) = torch.autograd.grad(y[4:].sum(), poisoned)
    assert grad[4:].isfinite().all()


@pytest.mark.numerics
@every_cell
@pytest.mark.parametrize("shape", SHAPES[2:], ids=lambda s: "T{}B{}I{}H{}".format(*s))
def test_threads_do_not_matter(cell, shape):
    T, B, I, H = shape
    module = module_of(cell, I, H, "stack", torch.float32)
    x, hx, reset = problem(cell, module, T, B)
    inputs, results = [t.requires_grad_() for t in (x, *flatten(hx))], []
    for threads in (1, 2, 3):
        set_threads(threads)
        out = flatten(module(x, hx, reset=reset, return_cell_states=CELLS[cell].has_c))
        results.append([*out, *gradients(module, inputs, out)])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.numerics
@every_cell
def test_no_resets_change_nothing(cell):
    module = module_of(cell, 17, 33, "stack", torch.float32)
    x, hx, reset = problem(cell, module, 9, 4, share=0)
    for a, b in zip(flatten(module(x, hx, reset=reset)), flatten(module(x, hx)), strict=True):
        assert torch.equal(a, b)


@every_cell
@pytest.mark.parametrize("batch_first", [False, True])
def test_packed_and_lengths(cell, batch_first):
    module = module_of(cell, 5, 18, num_layers=2, bidirectional=True, batch_first=batch_first)
    has_c = CELLS[cell].has_c
    x, hx, reset = problem(cell, module, 9, 4)
    lengths = torch.tensor([3, 9, 1, 6])
    time = 1 if batch_first else 0
    packed = pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False)
    marks = pack_padded_sequence(reset[..., None], lengths, batch_first, enforce_sorted=False)
    marks = PackedSequence(marks.data[:, 0], *marks[1:])
    results = []
    for given in (reset, marks):
        y, *rest = module(packed, hx, reset=given, return_cell_states=has_c)
        y, *cells = (pad_packed_sequence(p, batch_first)[0] for p in (y, *rest[1:]))
        results.append([y, *flatten(rest[0]), *cells])
    y, final, *cells = module(x, hx, lengths=lengths, reset=reset, return_cell_states=has_c)
    results.append([y, *flatten(final), *cells])
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        alone = x.narrow(time, 0, length).narrow(1 - time, row, 1)
        cuts = reset.narrow(time, 0, length).narrow(1 - time, row, 1)
        state = tuple(h[:, one].contiguous() for h in flatten(hx))
        want = by_loop(cell, module, alone, state if has_c else state[0], cuts)
        for got in results:
            sequences = [got[0], *got[3:]] if has_c else [got[0]]
            truths = [want[0], *want[3:]] if has_c else [want[0]]
            for a, b in zip(sequences, truths, strict=True):
                torch.testing.assert_close(a.narrow(time, 0, length).narrow(1 - time, row, 1), b)
            for a, b in zip(got[1 : 3 if has_c else 2], want[1 : 3 if has_c else 2], strict=True):
                torch.testing.assert_close(a[:, one], b)


@every_cell
@pytest.mark.parametrize("kind", ["stack", "batch first"])
def test_without_a_batch(cell, kind):
    module = module_of(cell, 5, 18, kind)
    x, hx, reset = problem(cell, module, 9, 1)
    has_c, row = CELLS[cell].has_c, 0 if module.batch_first else 1
    flat = tuple(h[:, 0] for h in flatten(hx))
    flags = reset.squeeze(row)
    got = flatten(
        module(x.squeeze(row), flat if has_c else flat[0], reset=flags, return_cell_states=has_c)
    )
    want = by_loop(cell, module, x, hx, reset)
    assert len(got) == len(want)
    for a, b, dim in zip(got, want, (row, 1, 1, row), strict=False):
        torch.testing.assert_close(a, b.squeeze(dim))


@every_cell
def test_gradcheck(cell):
    module = module_of(cell, 3, 4, num_layers=2)
    x, hx, reset = problem(cell, module, 4, 2)
    leaves = [t.requires_grad_() for t in (x, *flatten(hx))]

    def run(x, *flat):
        return flatten(
            module(
                x,
                flat if CELLS[cell].has_c else flat[0],
                reset=reset,
                return_cell_states=CELLS[cell].has_c,
            )
        )

    assert gradcheck(run, leaves)
    assert gradgradcheck(run, leaves, fast_mode=True)


@every_cell
def test_where_no_kernel_covers_the_call(cell):
    """Function transforms run on torch's operators: a batch of inputs, each with its resets."""
    module = module_of(cell, 5, 7)
    x, reset = torch.randn(3, 6, 2, 5, dtype=torch.float64), torch.rand(6, 2) < 0.4
    got = torch.func.vmap(lambda one: module(one, reset=reset)[0])(x)
    for a, one in zip(got, x, strict=True):
        torch.testing.assert_close(a, module(one, reset=reset)[0])


@every_cell
@every_stack
@pytest.mark.parametrize("lengths", [None, [4, 6, 0]], ids=str)
def test_all_arguments_under_a_transform(cell, kind, lengths):
    module = module_of(cell, 5, 7, kind)
    x, hx, reset = problem(cell, module, 6, 3)
    given = {"reset": reset, "return_cell_states": CELLS[cell].has_c}
    if lengths is not None:
        given["lengths"] = torch.tensor(lengths)
    want = flatten(module(x, hx, **given))
    found = torch.func.vmap(lambda one: flatten(module(one, hx, **given)))(x[None])
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a[0], b)


@every_cell
@pytest.mark.parametrize("batch_first", [False, True])
def test_layer_by_layer_is_the_stack(cell, batch_first):
    """A module with dropout runs its layers one by one. This probability drops nothing."""
    options = {"num_layers": 3, "bidirectional": True, "dropout": 1e-30}
    module = module_of(cell, 5, 18, batch_first=batch_first, **options)
    x, hx, reset = problem(cell, module, 9, 4)
    lengths = torch.tensor([3, 9, 1, 6])
    packed = pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False)
    for given, more in ((x, {}), (x, {"lengths": lengths}), (packed, {})):
        options = {"reset": reset, "return_cell_states": CELLS[cell].has_c, **more}
        outputs = [flatten(module.train(mode)(given, hx, **options)) for mode in (True, False)]
        assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


@pytest.mark.parametrize("what", ["reset", "cell states", "lengths"])
def test_parametrized_weights_are_read_anew(what):
    module = module_of("lstm", 5, 7)
    x, hx, reset = problem("lstm", module, 6, 3)
    given = {
        "reset": {"reset": reset},
        "cell states": {"return_cell_states": True},
        "lengths": {"lengths": [2, 6, 0]},
    }[what]
    torch.nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    original = module.parametrizations.weight_hh_l0.original1
    for _ in range(2):
        torch.nn.init.normal_(original)
        plain = module_of("lstm", 5, 7)
        plain.load_state_dict({name: getattr(module, name) for name in plain.state_dict()})
        got, want = (flatten(m(x, hx, **given)) for m in (module, plain))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
        assert torch.autograd.grad(got[0].sum(), original)[0].any()


def test_dropout_between_layers():
    module = module_of("lstm", 5, 18, num_layers=3, dropout=0.5, dtype=torch.float32)
    x, hx, reset = problem("lstm", module, 6, 3, share=0)
    outputs = []
    for options in ({}, {"reset": reset}):
        seed(1)
        outputs.append(module(x, hx, **options)[0])
    assert torch.equal(*outputs)
    y, (_, c_n), cells = module(x, hx, reset=reset, return_cell_states=True)
    assert cells.shape == y.shape
    assert torch.equal(cells[-1], c_n[-1])


def test_dropout_where_no_kernel_covers_the_call():
    """The check of the arguments draws no numbers."""

    class Mine(torch.Tensor):
        pass

    module = module_of("lstm", 5, 18, num_layers=3, dropout=0.5, dtype=torch.float32)
    x, hx, reset = problem("lstm", module, 6, 3, share=0)
    outputs = []
    for given, options in ((x, {}), (x.as_subclass(Mine), {"reset": reset})):
        seed(1)
        outputs.append(module(given, hx, **options)[0].as_subclass(torch.Tensor))
    torch.testing.assert_close(*outputs)


def test_cells_belong_to_the_outputs():
    """A call that goes on from (y[t], cells[t]) gives the rest, bit by bit."""
    module = module_of("lstm", 5, 33, dtype=torch.float32)
    x, hx, _ = problem("lstm", module, 9, 3)
    y, (h_n, c_n), cells = module(x, hx, return_cell_states=True)
    for t in (0, 4, 7):
        rest, (h, c) = module(x[t + 1 :], (y[t : t + 1], cells[t : t + 1]))
        assert torch.equal(rest, y[t + 1 :])
        assert torch.equal(h, h_n)
        assert torch.equal(c, c_n)
    assert torch.equal(cells[-1:], c_n)
    with torch.no_grad():
        assert torch.equal(module(x, hx, return_cell_states=True)[2], cells)
        with rnnfast.frozen(module):
            assert torch.equal(module(x, hx, return_cell_states=True)[2], cells)


def test_autocast():
    module = module_of("lstm", 5, 33, dtype=torch.float32)
    x, hx, reset = problem("lstm", module, 9, 3)
    with torch.autocast("cpu", torch.bfloat16):
        y, _, cells = module(x, hx, reset=reset, return_cell_states=True)
    want, _, truth = module(x, hx, reset=reset, return_cell_states=True)
    assert y.dtype == cells.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), want, rtol=0, atol=2**-6)
    torch.testing.assert_close(cells.float(), truth, rtol=0, atol=2**-5)


@every_cell
def test_arrays(cell):
    module = module_of(cell, 5, 18)
    x, _, reset = problem(cell, module, 9, 4)
    weights = [p.detach().numpy() for p in module.parameters()]
    for threads in (1, 2):
        out = rnnfast.arrays.forward(
            cell, x.detach().numpy(), weights, reset=reset.numpy(), save=True, threads=threads
        )
        y, _ = module(x.requires_grad_(), reset=reset)
        assert out.y.tobytes() == y.detach().numpy().tobytes()
        grads = out.backward(np.ones_like(out.y))
        want = torch.autograd.grad(y.sum(), [x, *module.parameters()])
        for name, b in zip(("x", "w_ih", "w_hh", "b_ih", "b_hh"), want, strict=True):
            np.testing.assert_allclose(getattr(grads, name), b.numpy(), rtol=1e-11, atol=1e-12)


def test_a_changed_mask_is_noticed():
    module = module_of("gru", 5, 18)
    x, hx, reset = problem("gru", module, 9, 4)
    y, _ = module(x, hx, reset=reset)
    reset.logical_not_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("reset", "error", "words"),
    [
        (torch.zeros(4, 3), TypeError, ["torch.bool", "torch.float32"]),
        (torch.zeros(4, 3, dtype=torch.uint8), TypeError, ["torch.bool", "torch.uint8"]),
        ([[False] * 3] * 4, TypeError, ["torch.bool", "list"]),
        (torch.zeros(3, 4, dtype=torch.bool), ValueError, ["(3, 4)", "(4, 3)"]),
        (torch.zeros(4, 1, dtype=torch.bool), ValueError, ["(4, 1)", "(4, 3)"]),
        (torch.zeros(4, dtype=torch.bool), ValueError, ["(4,)", "(4, 3)"]),
        (torch.zeros(5, 3, dtype=torch.bool), ValueError, ["(5, 3)", "(4, 3)"]),
    ],
    ids=str,
)
def test_bad_masks(reset, error, words):
    module, x = module_of("gru", 5, 18), torch.randn(4, 3, 5, dtype=torch.float64)
    packed = pack_padded_sequence(x, [4, 3, 1])
    for call in (
        lambda: module(x, reset=reset),
        lambda: module(packed, reset=reset),
        lambda: module(x, lengths=[4, 3, 1], reset=reset),
    ):
        with pytest.raises(error) as caught:
            call()
        for word in words:
            assert word in str(caught.value)


def test_other_bad_input():
    module, x = module_of("gru", 5, 18), torch.randn(4, 3, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match="GRU has no cell state"):
        module(x, return_cell_states=True)
    with pytest.raises(RuntimeError, match="Expected 5, got 6"):  # as torch says it
        module(torch.randn(4, 3, 6, dtype=torch.float64), reset=torch.zeros(4, 3, dtype=torch.bool))
    mask = torch.zeros(4, 3, dtype=torch.bool)
    for elsewhere in (mask.to("meta"), mask.to_sparse()):
        with pytest.raises(ValueError, match=r"reset is torch\..*; expected torch.strided on cpu"):
            module(x, reset=elsewhere)
    state = torch.zeros(1, 1, 18, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="Expected hidden size"):  # also where no kernel runs
        torch.func.vmap(lambda x: module(x, state, reset=mask)[0])(x.expand(2, 4, 3, 5))
    other = pack_padded_sequence(x, [4, 2, 1])
    marks = PackedSequence(torch.zeros(7, dtype=torch.bool), other.batch_sizes)
    shorter = PackedSequence(torch.zeros(6, dtype=torch.bool), torch.tensor([3, 2, 1]))
    packed = pack_padded_sequence(x, [4, 3, 1])
    for given, flags in ((packed, marks), (packed, shorter), (x, marks)):
        with pytest.raises(ValueError, match="packed as input is"):
            module(given, reset=flags)
    x, *weights = (np.zeros(shape, np.float32) for shape in ((4, 3, 5), (12, 5), (12, 3)))
    for mask, error in ((np.zeros((3, 4), bool), ValueError), (np.zeros((4, 3), np.uint8), TypeError)):
        with pytest.raises(error, match="reset has"):
            rnnfast.arrays.forward("lstm", x, weights, reset=mask)


def test_modules_that_learned_before_these_keywords():
    """Modules of torch.nn and pickles of older versions have no new state to miss."""
    module, older = (make(package, "lstm", 5, 18) for package in (rnnfast, torch.nn))
    assert vars(module).keys() == vars(older).keys()
    older.__class__ = rnnfast.LSTM
    file = io.BytesIO()
    torch.save(older, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    x, reset = torch.randn(4, 3, 5), torch.rand(4, 3) < 0.5
    for m in (older, loaded):
        got, want = (flatten(m(x, reset=reset, return_cell_states=True)) for m in (m, module))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.skipif(not EXAMPLE.exists(), reason="the tests run outside the source tree")
def test_the_example(capsys):
    """A recurrent PPO update by a Python loop over the steps, and by one call: loss and gradients."""
    results = runpy.run_path(str(EXAMPLE), {"SECONDS": 0.02}, run_name="example")["compare"](
        seconds=0.02
    )
    assert results.same_loss
    assert results.same_gradients
    for times in (results.recurrence, results.update):
        assert times.loop > times.call
