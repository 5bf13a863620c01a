"""Backward as the adjoint of forward, and as a citizen of autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import problems
import reference
import rnnfast
import tolerances
from problems import Problem, forward_arrays
from reference import CELLS

numerics = pytest.mark.numerics  # of the tests that depend on the instruction set

every_cell = pytest.mark.parametrize("cell", CELLS)


def module_of(cell, *args, suffix="", **kwargs):
    kwargs = {"dtype": torch.float64} | dict(CELLS[cell].options) | kwargs
    return getattr(rnnfast, CELLS[cell].layer + suffix)(*args, **kwargs)


def states_of(cell, *shape, dtype=torch.float64):
    """A list of one state, or of two for an LSTM."""
    return [
        (0.5 * torch.randn(*shape, dtype=dtype)).requires_grad_() for _ in range(1 + CELLS[cell].has_c)
    ]


def flatten(out):
    """All the tensors of a module's output, in order."""
    return (out,) if torch.is_tensor(out) else tuple(o for part in out for o in flatten(part))


def as_function(cell, module):
    """The module as a function of x, its states and its parameters, to all its outputs."""
    names = [name for name, _ in module.named_parameters()]
    split = 1 + CELLS[cell].has_c

    def function(x, *rest):
        states, values = rest[:split], rest[split:]
        hx = states if CELLS[cell].has_c else states[0]
        parameters = dict(zip(names, values, strict=True))
        return flatten(torch.func.functional_call(module, parameters, (x, hx)))

    return function


CONFIGURATIONS = {
    "one": {},
    "nobias": {"bias": False},
    "bidirectional": {"bidirectional": True},
    "two_layers": {"num_layers": 2},
    "both": {"num_layers": 2, "bidirectional": True},
    "batch_first": {"batch_first": True},
}


@numerics
@every_cell
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_gradcheck_of_layers(cell, configuration):
    module = module_of(cell, 3, 5, **CONFIGURATIONS[configuration])
    count = module.num_layers * (2 if module.bidirectional else 1)
    shape = (2, 3, 3) if module.batch_first else (3, 2, 3)
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    inputs = (x, *states_of(cell, count, 2, 5), *module.parameters())
    assert gradcheck(as_function(cell, module), inputs, fast_mode=module.num_layers > 1)


@numerics
@every_cell
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck_of_cell_modules(cell, bias):
    module = module_of(cell, 3, 5, suffix="Cell", bias=bias)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(as_function(cell, module), (x, *states_of(cell, 2, 5), *module.parameters()))


@every_cell
@pytest.mark.parametrize("suffix", ["", "Cell"])
def test_double_backward(cell, suffix):
    module = module_of(cell, 2, 3, suffix=suffix)
    lead = () if suffix else (2,)
    x = torch.randn(*lead, 2, 2, dtype=torch.float64, requires_grad=True)
    states = states_of(cell, *(() if suffix else (1,)), 2, 3)
    assert gradgradcheck(as_function(cell, module), (x, *states, *module.parameters()))


@pytest.mark.parametrize("cell", [name for name, cell in CELLS.items() if cell.in_torch])
def test_gradient_penalty_equals_torchs(cell):
    """The usual use of a double backward: a loss on the norm of an input gradient."""
    ours = module_of(cell, 5, 17, num_layers=2, bidirectional=True)
    theirs = getattr(torch.nn, CELLS[cell].layer)(
        5, 17, 2, bidirectional=True, dtype=torch.float64, **dict(CELLS[cell].options)
    )
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    for module in (ours, theirs):
        (slope,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
        (slope.norm() - 1).square().backward()
    for got, want in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-11, atol=1e-12)


def inner(a, b):
    return sum(float(np.sum(a[name] * b[name])) for name in a)


SHAPES = [(5, 3, 17, 65), (20, 1, 130, 130), (7, 33, 65, 17)]


@numerics
@every_cell
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_backward_is_the_adjoint_of_the_true_derivative(cell, shape, reverse):
    """<dy, J v> = <J' dy, v>, J v by forward-mode differentiation of the formula."""
    problem = Problem(cell, *shape, "float64", reverse=reverse)
    inputs, v = problem.inputs(), Problem(cell, *shape, "float64", seed=7).inputs()
    order = [name for name in problems.INPUTS if name in inputs]

    def formula(*args):
        named = dict(zip(order, args, strict=True))
        x, h0, c0, *weights = (named.get(name, torch.zeros(())) for name in problems.INPUTS)
        y, h_n, c_n = reference.layer(cell, x, h0, c0, weights, reverse=reverse)
        return (y, h_n, c_n) if CELLS[cell].has_c else (y, h_n)

    points, tangents = (tuple(torch.from_numpy(of[name]) for name in order) for of in (inputs, v))
    _, jv = torch.func.jvp(formula, points, tangents)
    left = inner(
        dict(zip(problem.cotangents(), (j.numpy() for j in jv), strict=True)), problem.cotangents()
    )
    solution = problems.by_arrays(problem)
    right = inner(v, {name: solution[f"d_{name}"] for name in v})
    assert right == pytest.approx(left, rel=1e-12 * len(order) * 10, abs=1e-11)


@numerics
@pytest.mark.parametrize("cell", [name for name in CELLS if name != "rnn_relu"])  # has corners
@pytest.mark.parametrize("shape", SHAPES)
def test_backward_is_the_adjoint_of_our_forward(cell, shape):
    """The same with J v by central differences of our own forward: they agree with each other."""
    problem = Problem(cell, *shape, "float64")
    inputs, v = problem.inputs(), Problem(cell, *shape, "float64", seed=7).inputs()

    def outputs(step):
        moved = {name: value + step * v[name] for name, value in inputs.items()}
        result = forward_arrays(cell, **moved)
        return {"dy": result.y, "dh_n": result.h_n, "dc_n": result.c_n}

    ahead, behind = outputs(tolerances.CENTRAL_STEP), outputs(-tolerances.CENTRAL_STEP)
    d = problem.cotangents()
    jv = {name: (ahead[name] - behind[name]) / (2 * tolerances.CENTRAL_STEP) for name in d}
    solution = problems.by_arrays(problem)
    right = inner(v, {name: solution[f"d_{name}"] for name in v})
    assert right == pytest.approx(inner(d, jv), rel=tolerances.CENTRAL_RTOL)


@numerics
@every_cell
@pytest.mark.parametrize("suffix", ["", "Cell"])
def test_only_those_that_ask(cell, suffix):
    """Each input alone, and all but each: None for the others, the same bits for the rest."""
    module = module_of(cell, 5, 17, suffix=suffix)
    x = torch.randn(*(() if suffix else (4,)), 3, 5, dtype=torch.float64)
    states = states_of(cell, *(() if suffix else (1,)), 3, 17)
    leaves = [x, *states, *module.parameters()]

    def gradients(wanted):
        for index, leaf in enumerate(leaves):
            leaf.grad = None
            leaf.requires_grad_(index in wanted)
        flat = flatten(module(x, tuple(states) if CELLS[cell].has_c else states[0]))
        sum((o * torch.arange(o.numel()).view_as(o)).sum() for o in flat).backward()
        return [leaf.grad for leaf in leaves]

    everything = set(range(len(leaves)))
    full = gradients(everything)
    for wanted in [{i} for i in everything] + [everything - {i} for i in everything]:
        for index, got in enumerate(gradients(wanted)):
            if index in wanted:
                assert torch.equal(got, full[index])
            else:
                assert got is None


@every_cell
def test_no_graph_where_nothing_asks(cell):
    module = module_of(cell, 5, 17).requires_grad_(False)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    y, _ = module(x)
    assert not y.requires_grad
    with torch.no_grad():
        assert not module.requires_grad_(True)(x)[0].requires_grad
    with torch.inference_mode():
        assert module(x)[0].is_inference()


@numerics
@every_cell
def test_each_output_alone(cell):
    """A loss on only y, only h_n or only c_n: the absent gradients count as zero."""
    module = module_of(cell, 5, 17, num_layers=2, bidirectional=True)
    x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    states = states_of(cell, 4, 3, 17)
    inputs = [x, *states, *module.parameters()]
    ours = as_function(cell, module)(*inputs)
    zeros = torch.zeros_like(states[0])
    true = reference.stack(cell, module, x, states[0], states[1] if len(states) > 1 else zeros)
    for got, want in zip(ours, true, strict=False):
        d = torch.randn_like(want)
        got, want = (
            torch.autograd.grad(o, inputs, d, retain_graph=True, allow_unused=True) for o in (got, want)
        )
        for a, b in zip(got, want, strict=True):
            a, b = (torch.zeros(()) if g is None else g for g in (a, b))
            torch.testing.assert_close(
                *torch.broadcast_tensors(a, b), rtol=0, atol=1e-11, check_dtype=False
            )


@numerics
@every_cell
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_twice_the_same_bits(cell, dtype):
    module = module_of(cell, 17, 65, dtype=dtype)
    x = torch.randn(7, 5, 17, dtype=dtype, requires_grad=True)
    loss = module(x)[0].square().sum()
    inputs = [x, *module.parameters()]
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    module(x + 1)[0].sum().backward()
    second = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, inputs)


@every_cell
def test_gradients_accumulate(cell):
    module = module_of(cell, 5, 17)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    module(x)[0].sum().backward()
    once = [p.grad.clone() for p in module.parameters()]
    module(x)[0].sum().backward()
    for p, g in zip(module.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, 2 * g, rtol=1e-14, atol=0)


@every_cell
@pytest.mark.parametrize("what", ["x", "weight_ih_l0", "weight_hh_l0"])
def test_in_place_change_before_backward_is_an_error(cell, what):
    module = module_of(cell, 5, 17)
    x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    y, _ = module(x)
    with torch.no_grad():
        (x if what == "x" else getattr(module, what)).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@every_cell
def test_in_place_change_of_a_state_is_never_silent(cell):
    """Callers zero their states in place; the gradient is the true one or an error."""
    module = module_of(cell, 5, 17)
    x, states = torch.randn(4, 3, 5, dtype=torch.float64), states_of(cell, 1, 3, 17)
    hx = tuple(states) if CELLS[cell].has_c else states[0]
    want = torch.autograd.grad(module(x, hx)[0].sum(), list(module.parameters()))
    for state in states:
        y, _ = module(x, hx)
        before = state.detach().clone()
        with torch.no_grad():
            state.zero_()
        try:
            got = torch.autograd.grad(y.sum(), list(module.parameters()))
        except RuntimeError as error:
            if "inplace" not in str(error):
                raise
        else:
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        with torch.no_grad():
            state.copy_(before)


def loss_after_in_place(module, x, which, relu):
    flat = list(flatten(module(x)))
    if which < len(flat):
        flat[which] = relu(flat[which])
    loss = sum(o.square().sum() for o in flat)
    return torch.autograd.grad(loss, list(module.parameters()))


@pytest.mark.parametrize("cell", [name for name, cell in CELLS.items() if cell.in_torch])
@pytest.mark.parametrize("suffix", ["", "Cell"])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_outputs_may_be_changed_in_place_where_torchs_may(cell, suffix, which):
    """y.relu_(), h.mul_(mask): right wherever torch.nn is right, and elsewhere never silent."""
    ours = module_of(cell, 5, 17, suffix=suffix)
    theirs = getattr(torch.nn, CELLS[cell].layer + suffix)(
        5, 17, dtype=torch.float64, **dict(CELLS[cell].options)
    )
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(*(() if suffix else (4,)), 3, 5, dtype=torch.float64)
    want = loss_after_in_place(theirs, x, which, torch.relu)
    allowed = True
    try:
        loss_after_in_place(theirs, x, which, torch.relu_)
    except RuntimeError:
        allowed = False
    try:
        got = loss_after_in_place(ours, x, which, torch.relu_)
    except RuntimeError:
        assert not allowed
    else:
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@every_cell
def test_final_states_may_be_detached_in_place(cell):
    """Truncated backpropagation in many programs: h.detach_() between chunks."""
    module = module_of(cell, 5, 17)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    _, state = module(x)
    for h in state if CELLS[cell].has_c else (state,):
        h.detach_()
    module(x, state)[0].sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def strided(t):
    """The same values with gaps between them."""
    if t.dim() < 2:
        return t
    wide = t.new_zeros(*t.shape[:-1], 2 * t.shape[-1])
    wide[..., ::2] = t
    return wide[..., ::2]


@every_cell
@pytest.mark.parametrize("changed", [False, True], ids=["", "changed"])
def test_saved_tensor_hooks_that_return_other_strides(cell, changed):
    module, x = module_of(cell, 5, 7, num_layers=2), torch.randn(4, 3, 5, dtype=torch.float64)
    want = torch.autograd.grad(module(x)[0].sum(), list(module.parameters()))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, strided):
        y, _ = module(x)
    loss = y.sum()
    if changed:
        with torch.no_grad():
            y.zero_()
    got = torch.autograd.grad(loss, list(module.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@every_cell
def test_backward_lets_go_of_the_output(cell):
    """A loss that is kept for a log must not keep what backward needed."""
    module, x = module_of(cell, 5, 7), torch.randn(4, 3, 5, dtype=torch.float64)
    y, _ = module(x)
    address, node = y.data_ptr(), y.grad_fn
    loss = y.square().sum()
    held = [t for t in node.saved_tensors if t is not None]
    assert any(t.data_ptr() == address for t in held)  # hooks and checkpoints see it
    del held
    loss.backward()
    alive = [v for v in vars(node).values() if torch.is_tensor(v)]
    assert alive
    assert all(t.untyped_storage().nbytes() == 0 for t in alive)
    with pytest.raises(RuntimeError, match="after they have already been freed"):
        _ = node.saved_tensors


@every_cell
def test_checkpoint_and_saved_tensor_hooks(cell):
    """What backward needs goes through autograd, where checkpointing and offloading find it."""
    module = module_of(cell, 5, 17)
    x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    inputs = [x, *module.parameters()]
    want = torch.autograd.grad(module(x)[0].square().sum(), inputs)
    y = checkpoint(lambda a: module(a)[0], x, use_reentrant=False)
    got = torch.autograd.grad(y.square().sum(), inputs)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: packed.append(t.numel()) or t.clone(), lambda t: t
    ):
        y = module(x)[0]
    hooked = torch.autograd.grad(y.square().sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(hooked, want, strict=True))
    assert sum(packed) >= x.numel()


@every_cell
def test_functional_transforms(cell):
    """torch.func.grad and torch.func.jvp, which torch.nn's classes support."""
    module = module_of(cell, 5, 17)
    x, v = torch.randn(2, 4, 3, 5, dtype=torch.float64)

    def formula(x):
        zeros = torch.zeros(1, 3, 17, dtype=torch.float64)
        return reference.stack(cell, module, x, zeros, zeros)[0]

    got = torch.func.grad(lambda x: module(x)[0].square().sum())(x)
    want = torch.func.grad(lambda x: formula(x).square().sum())(x)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
    got = torch.func.jvp(lambda x: module(x)[0], (x,), (v,))[1]
    want = torch.func.jvp(formula, (x,), (v,))[1]
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
