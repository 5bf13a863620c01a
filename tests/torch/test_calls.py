"""What may happen to a module between two calls: each reads its weights and settings anew."""

from __future__ import annotations

import copy
import gc
import sys
import weakref

import numpy as np
import pytest
import torch
from torch.nn.utils import parametrize

import rnnfast
from rnnfast import _C
from rnnfast.stack import precision
from seeds import seed
from twins import LAYERS, flatten, make, states

MODES = [torch.no_grad, torch.inference_mode, torch.enable_grad]
every_mode = pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.__name__)
every_cell = pytest.mark.parametrize("cell", LAYERS)
every_kind = pytest.mark.parametrize("suffix", ["", "Cell"], ids=["layer", "cell"])


def problem(cell, suffix, package=rnnfast, hidden=4):
    """A module, its input and its states."""
    module = make(package, cell, 3, hidden, suffix=suffix)
    leading = (2,) if suffix else (1, 2)
    return module, torch.randn(*leading, 3), states(cell, *leading, hidden)


def weight(module, name="weight_hh"):
    return getattr(module, name + ("" if hasattr(module, name) else "_l0"))


def states_of(h):
    return h if type(h) is tuple else (h,)


def run(module, *arguments):
    return [t.detach().clone() for t in flatten(module(*arguments))]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def smaller(w):
    w.data = w.data[:-1].clone()


def narrower(w):
    w.data = w.data[:, :-1].clone()


def without_memory(w):
    w.untyped_storage().resize_(0)


def emptied(w):
    with torch.no_grad():
        w.set_()


@every_mode
@every_cell
@every_kind
@pytest.mark.parametrize("change", [smaller, narrower, without_memory, emptied])
def test_weights_that_shrink_are_refused(mode, cell, suffix, change):
    if change is without_memory and (cell, suffix) == ("lstm", ""):
        pytest.skip("torch.nn.LSTM, which then has the word, ends the process itself")
    module, x, h = problem(cell, suffix)
    kept = copy.deepcopy(module.state_dict())
    with mode():
        want = run(module, x, h)
        change(weight(module))
        with pytest.raises((RuntimeError, IndexError)):
            module(x, h)
        for name, value in kept.items():
            module._parameters[name].data = value
        assert same(run(module, x, h), want)


def replaced(module):
    weight(module).data = weight(module).data * 2


def set_in_place(module):
    with torch.no_grad():
        weight(module).set_(weight(module).clone() * 2)


def through_numpy(module):
    weight(module).detach().numpy()[...] *= 2


def negated(module):
    """The same memory, which now holds the negatives of the values."""
    weight(module).data = torch._neg_view(weight(module).data)


def assigned(module):
    name = next(n for n, p in module.named_parameters() if p is weight(module))
    setattr(module, name, torch.nn.Parameter(weight(module).detach() * 2))


def transposed(module):
    weight(module).data = weight(module).data.t().contiguous().t()


@every_mode
@every_cell
@every_kind
@pytest.mark.parametrize(
    "change", [replaced, set_in_place, through_numpy, negated, assigned, transposed]
)
def test_changed_weights_are_read(mode, cell, suffix, change):
    module, x, h = problem(cell, suffix)
    with mode():
        before = run(module, x, h)
        change(module)
        fresh = make(rnnfast, cell, 3, 4, suffix=suffix)
        fresh.load_state_dict(module.state_dict())
        assert same(run(module, x, h), run(fresh, x, h))
        assert same(run(module, x, h), before) == (change is transposed)


def assert_outcomes_agree(cell, suffix, change, mode):
    """After it, a module of either package returns the same or raises the same."""
    found = []
    for package in (rnnfast, torch.nn):
        module, x, h = problem(cell, suffix, package)
        with mode():
            run(module, x, h)
            change(module)
            try:
                found.append(run(module, x, h))
            except Exception as error:
                found.append((type(error), str(error)))
    ours, theirs = found
    if isinstance(theirs, tuple):
        assert ours == theirs
    else:
        torch.testing.assert_close(ours, theirs)


@every_mode
@every_cell
@every_kind
def test_deleted_weights(mode, cell, suffix):
    name = "weight_hh" if suffix else "weight_hh_l0"
    assert_outcomes_agree(cell, suffix, lambda module: delattr(module, name), mode)


@every_mode
@every_cell
def test_a_bias_of_a_cell_that_is_none(mode, cell):
    assert_outcomes_agree(cell, "Cell", lambda module: setattr(module, "bias_ih", None), mode)


@every_mode
@every_kind
@pytest.mark.parametrize("size", [np.int64(3), 3.0, 5, np.int64(5), 2.5, 2**80])
def test_another_input_size(mode, suffix, size):
    """What it is compared with need be no integer, and torch's cells compare it with nothing."""
    assert_outcomes_agree("gru", suffix, lambda module: setattr(module, "input_size", size), mode)


class Listening(torch.Tensor):
    calls = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.calls += 1
        return super().__torch_function__(func, types, args, kwargs or {})


@every_mode
@every_cell
@every_kind
def test_subclasses_after_plain_tensors(mode, cell, suffix):
    module, x, h = problem(cell, suffix)
    with mode():
        want = run(module, x, h)
        mine = (
            tuple(s.as_subclass(Listening) for s in h) if type(h) is tuple else h.as_subclass(Listening)
        )
        for given in ((x.as_subclass(Listening), h), (x, mine)):
            Listening.calls = 0
            found = module(*given)
            assert Listening.calls > 0
            for a, b in zip(flatten(found), want, strict=True):
                torch.testing.assert_close(a.as_subclass(torch.Tensor), b)


@every_cell
@every_kind
def test_hooks_registered_later(cell, suffix):
    module, x, h = problem(cell, suffix)
    with torch.no_grad():
        want = run(module, x, h)
        seen = []
        module.register_forward_pre_hook(lambda m, args: (args[0] * 2, *args[1:]))
        module.register_forward_hook(lambda m, args, out: seen.append(out))
        found = run(module, x, h)
    assert same(found, run(make(rnnfast, cell, 3, 4, suffix=suffix), 2 * x, h))
    assert not same(found, want)
    assert len(seen) == 1


@every_cell
@every_kind
def test_hooks_of_outputs_without_a_gradient_are_not_called(cell, suffix):
    module, x, h = problem(cell, suffix)
    outputs = list(flatten(module(x, h)))
    for used in range(len(outputs)):
        called = []
        outputs = list(flatten(module(x, h)))
        for k, output in enumerate(outputs):
            output.register_hook(lambda g, k=k, called=called: called.append((k, g.shape)))
        outputs[used].sum().backward()
        assert called == [(used, outputs[used].shape)]


@every_cell
@every_kind
def test_hooks_of_several_outputs(cell, suffix):
    """torch.utils.module_tracker uses them. torch's hook counts its calls, also those with None."""
    module, x, h = problem(cell, suffix)
    for mode in ("all", "any"):
        outputs, called = list(flatten(module(x, h))), []
        torch.autograd.graph.register_multi_grad_hook(outputs, called.append, mode=mode)
        outputs[0].sum().backward()
        want = [True, *(False for _ in outputs[1:])]
        assert len(called) == 1
        assert mode == "any" or [g is not None for g in called[0]] == want


@every_cell
@every_kind
def test_a_node_saves_only_tensors(cell, suffix):
    """The package torchviz calls size() of all that a node has saved."""
    module, x, h = problem(cell, suffix)
    for outputs in (flatten(module(x)), flatten(module(x, h))):
        assert all(torch.is_tensor(t) for t in outputs[0].grad_fn.saved_tensors)


class Halves(torch.nn.Module):
    """A parametrization with a state and random numbers."""

    calls = 0

    def forward(self, weight):
        self.calls += 1
        return torch.nn.functional.dropout(weight, 0.5)


@every_cell
@every_kind
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_a_parametrization_is_evaluated_as_often_as_in_torch(cell, suffix, mode):
    found = []
    for package in (rnnfast, torch.nn):
        seed(0)
        module, x, h = problem(cell, suffix, package)
        name = "weight_hh" if suffix else "weight_hh_l0"
        halves = Halves()
        parametrize.register_parametrization(module, name, halves)
        halves.calls = 0
        with mode():
            found.append([*flatten(module(x, h)), torch.rand(1)])
        found[-1].append(torch.tensor(halves.calls))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@every_cell
def test_a_functional_call_keeps_no_weights(cell):
    module, x, h = problem(cell, "")
    weights = {name: w * 1.0 for name, w in module.named_parameters()}
    kept = weakref.ref(weights["weight_hh_l0"])
    packed = torch.nn.utils.rnn.pack_sequence([x[0]])
    torch.func.functional_call(module, weights, (packed,))
    del weights
    module(x, h)
    assert kept() is None


@pytest.mark.parametrize("cell", ["gru", "rnn_tanh"])
def test_options_that_a_cell_does_not_have(cell):
    """As torch.nn's modules, which notice attributes that were changed."""
    module, x, _ = problem(cell, "")
    module.proj_size = 2
    for mode in (torch.no_grad, torch.enable_grad):
        with mode(), pytest.raises(RuntimeError, match=r"Expected hidden size \(1, 2, 2\)"):
            module(x)


@every_mode
@every_cell
@every_kind
def test_empty_batches(mode, cell, suffix):
    module, x, _ = problem(cell, suffix)
    rows = 0 if suffix else 1
    with mode():
        found = flatten(module(x.narrow(rows, 0, 0)))
    assert all(t.size(rows) == 0 and t.size(-1) == 4 for t in found)


@every_mode
@every_cell
@pytest.mark.parametrize("kind", ["layer", "batch_first", "cell"])
@pytest.mark.parametrize("has_states", [False, True])
def test_one_row_without_a_batch_takes_the_fast_path(mode, cell, kind, has_states, monkeypatch):
    suffix, batch_first = "Cell" if kind == "cell" else "", kind == "batch_first"
    options = {} if suffix else {"num_layers": 2, "bidirectional": True, "batch_first": batch_first}
    module = make(rnnfast, cell, 3, 4, suffix=suffix, **options)
    x, hx = torch.randn(*([] if suffix else [5]), 3), None
    at_x, at_state = (0, 0) if suffix else (0 if batch_first else 1, 1)
    if has_states:
        hx = states(cell, *([] if suffix else [4]), 4)
        batched = tuple(h.unsqueeze(at_state) for h in states_of(hx))
        batched = batched if type(hx) is tuple else batched[0]
    with mode():
        y, *rest = run(module, x.unsqueeze(at_x), *([batched] if has_states else []))
        want = [y.squeeze(at_x), *(h.squeeze(at_state) for h in rest)]
        monkeypatch.setattr(type(module), "_run", lambda *_, **__: pytest.fail("the slow path"))
        assert same(run(module, x, *([hx] if has_states else [])), want)


@pytest.mark.parametrize("hx", [[], [1], [None, None], ["h", "c"], [torch.zeros(2, 4)] * 3, 5, "hc"])
@every_kind
def test_states_of_no_kind(hx, suffix):
    ours, theirs = (problem("lstm", suffix, package) for package in (rnnfast, torch.nn))
    errors = []
    for module, x, _ in (ours, theirs):
        with torch.no_grad(), pytest.raises(Exception) as error:  # noqa: PT011 (whatever torch's is)
            module(x, hx)
        errors.append((type(error.value), str(error.value)))
    assert errors[0] == errors[1]


class Emptying(torch.overrides.TorchFunctionMode):
    """Takes from a list what lies in it while the call looks at it."""

    def __init__(self, target):
        super().__init__()
        self.target = target

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.target.clear()
        return func(*args, **(kwargs or {}))


@every_kind
def test_a_list_of_states_emptied_meanwhile(suffix):
    module, x, h = problem("lstm", suffix)
    with torch.no_grad():
        want = run(module, x, h)
        given = [s.clone() for s in h]
        with Emptying(given):
            found = module(x, given)
        assert same(flatten(found), want)
    assert given == []


@every_cell
@every_kind
def test_nothing_is_kept(cell, suffix):
    """Neither by a call nor by one that fails halfway."""
    module, x, h = problem(cell, suffix)
    wrong = torch.randn(*x.shape[:-1], 7)
    held = [x, wrong, *states_of(h), *module.parameters()]

    def fail(*arguments):
        with pytest.raises((RuntimeError, TypeError, ValueError, AttributeError)):
            module(*arguments)

    def calls():
        with torch.no_grad():
            module(x, h)
            module(x)
            fail(wrong, h)
            fail(x, [None, None])
            data, weight(module).data = weight(module).data, torch.zeros(3, 3)
            fail(x, h)
            weight(module).data = data
            if not suffix:
                with Emptying([]):
                    module(x, h)

    calls()
    gc.collect()
    before = [sys.getrefcount(t) for t in held]
    for _ in range(20):
        calls()
    gc.collect()
    assert [sys.getrefcount(t) for t in held] == before


def test_autocast_for_another_device():
    """It changes nothing on the CPU."""
    module, x, h = problem("lstm", "")
    with torch.no_grad():
        want = run(module, x, h)
        torch.set_autocast_enabled("cuda", True)
        try:
            assert precision.may_autocast()
            assert same(run(module, x, h), want)
        finally:
            torch.set_autocast_enabled("cuda", False)
        with torch.autocast("cpu", torch.bfloat16):
            assert module(x, h)[0].dtype == torch.bfloat16


ARGUMENTS = {
    "types": ((torch.Tensor,), 5),
    "threads": (1, "one"),
    "x": (torch.zeros(1, 2, 3), None),
    "hx": (None, None),
    "parameters": ({"a": torch.zeros(16, 3), "b": torch.zeros(16, 4)}, ["a"]),
    "names": (["a", "b"], "ab"),
    "sizes": (None, torch.ones(3)),
    "reset": (None, None),
    "flat": (None, [torch.zeros(16, 3)] * 2),
    "dims": (3, "three"),
    "features": (3, None),
    "packed": (None, "packed"),
}


@pytest.mark.parametrize("name", [None, *ARGUMENTS])
def test_arguments_of_the_extension(name):
    """The method is of the C API, and checks by itself what it is given."""
    stack = _C.Stack(cell=2, bias=False)
    given = [wrong if name == key else right for key, (right, wrong) in ARGUMENTS.items()]
    given = [*given[:2], tuple(given[2:9]), *given[9:]]
    if name in ("types", "threads", "dims", "parameters", "packed"):
        with pytest.raises(TypeError, match=r"incompatible|must be a dict, got list"):
            stack.call_module(*given)
    elif name in ("sizes", "x", "features", "names", "flat"):
        assert stack.call_module(*given) is None
    else:
        y, (_, c_n) = stack.call_module(*given)
        assert (y.shape, c_n.shape) == ((1, 2, 4), (1, 2, 4))
    with pytest.raises(TypeError, match="got 5, expected 6"):
        stack.call_module(*given[:-1])
    with pytest.raises(TypeError, match="call_module"):
        _C.Stack.call_module(*given)


X = torch.zeros(1, 2, 3)
WEIGHTS = [torch.zeros(16, 3), torch.zeros(16, 4)]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((X, None, None, WEIGHTS, None), "inputs has 5 entries; expected 6"),
        ((X, None, None, (*WEIGHTS,), None, None), "weights must be a list, got tuple"),
        ([X, None, None, WEIGHTS, None, None], "incompatible"),
    ],
    ids=["too few", "no list", "no tuple"],
)
def test_bundles_of_inputs_that_are_none(inputs, message):
    stack, y = _C.Stack(cell=2, bias=False), torch.zeros(1, 2, 4)
    left = (y, None, None, None, None)
    right = (X, None, None, WEIGHTS, None, None)
    assert stack.call((torch.Tensor,), 1, right, None, None)[0].shape == y.shape
    stack.forward(1, right, left)
    with pytest.raises(TypeError, match=message):
        stack.call((torch.Tensor,), 1, inputs, None, None)
    with pytest.raises(TypeError, match=message):
        stack.forward(1, inputs, left)
    with pytest.raises(TypeError, match=message):
        stack.backward(1, inputs, y, y, (None,) * 4, (*(None,) * 3, [None, None], *(None,) * 2))
    with pytest.raises(TypeError, match="outputs has 4 entries; expected 5"):
        stack.forward(1, right, left[:4])
    with pytest.raises(TypeError, match="gradients of the inputs has 5 entries; expected 6"):
        stack.backward(1, right, y, y, (None,) * 4, (None,) * 5)
    with pytest.raises(TypeError, match="incompatible constructor arguments"):
        _C.Stack(2)
