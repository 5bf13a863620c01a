"""torch.compile, torch.export and the operators that they see."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

import rnnfast
from graphs import recorded, same
from reference import CELLS
from twins import OF_EACH_CLASS, flatten, make, states

every_cell = pytest.mark.parametrize("cell", OF_EACH_CLASS)
every_suffix = pytest.mark.parametrize("suffix", ["", "Cell"])

OPTIONS = {
    "layer": {},
    "stack": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "no bias": {"bias": False},
}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


@every_cell
@pytest.mark.parametrize("kind", [*OPTIONS, "Cell"])
def test_one_graph_forward_and_backward(cell, kind):
    """Without a break, through our operator, and with the bits of the eager call."""
    suffix = "Cell" if kind == "Cell" else ""
    module = make(rnnfast, cell, 5, 17, suffix=suffix, **OPTIONS.get(kind, {}))
    backend, names = recorded()
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    x = torch.randn(*(() if suffix else (4,)), 3, 5, requires_grad=True)
    batch = 4 if kind == "stack" else 3
    hx = states(cell, *(() if suffix else (4 if kind == "stack" else 1,)), batch, 17)
    for given in ((x,), (x, hx)):
        got, want = compiled(*given), module(*given)
        same(got, want)
        leaves = [x, *module.parameters()]
        a, b = (
            torch.autograd.grad(sum(o.square().sum() for o in flatten(out)), leaves)
            for out in (got, want)
        )
        same(a, b)
        with torch.no_grad():
            same(compiled(*given), want)
    assert names()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    module = rnnfast.GRU(5, 17, dtype=dtype)
    x = torch.randn(4, 3, 5, dtype=dtype, requires_grad=True)
    y = torch.compile(module, fullgraph=True, backend="aot_eager")(x)[0]
    same(y, module(x)[0])
    assert y.dtype == dtype
    y.float().sum().backward()
    assert x.grad.dtype == dtype


def test_autocast():
    module, x = rnnfast.LSTM(5, 17), torch.randn(4, 3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = torch.compile(module, fullgraph=True, backend="aot_eager")(x), module(x)
    same(got, want)
    assert got[0].dtype == torch.bfloat16


def test_projections_resets_and_cells():
    module = rnnfast.LSTM(5, 17, 2, proj_size=7, bidirectional=True)
    x, reset = torch.randn(6, 3, 5), torch.rand(6, 3) < 0.4

    def run(x, reset):
        return module(x, reset=reset, return_cell_states=True)

    backend, names = recorded()
    same(torch.compile(run, fullgraph=True, backend=backend)(x, reset), run(x, reset))
    assert names()


class Tagger(torch.nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.embed = torch.nn.Linear(5, 8)
        self.rnn = rnnfast.LSTM(8, 17, 2, dropout=dropout, bidirectional=True)
        self.head = torch.nn.Linear(34, 3)

    def forward(self, x):
        y, (h, _) = self.rnn(self.embed(x))
        return self.head(y) + h.sum()


def test_any_batch_and_length_without_compiling_again():
    net = Tagger(dropout=0.3)
    backend, _ = recorded()
    compiled = torch.compile(net, fullgraph=True, backend=backend)
    counts = []
    for steps, batch in ((6, 3), (7, 4), (9, 2), (20, 33), (5, 8)):
        x = torch.randn(steps, batch, 5)
        torch.manual_seed(1)
        got = compiled(x)
        torch.manual_seed(1)  # the same dropout masks
        torch.testing.assert_close(got, net(x))
        got.sum().backward()
        counts.append(backend.frame_count)
    assert counts[-1] == counts[1] <= 2  # once for these sizes, once for any


def test_inductor():
    net = Tagger()
    x = torch.randn(6, 3, 5)
    compiled = torch.compile(net, fullgraph=True)
    torch.testing.assert_close(compiled(x), net(x))
    grads = [torch.autograd.grad(f(x).square().sum(), list(net.parameters())) for f in (compiled, net)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_dynamic_sizes(strict):
    net = Tagger().eval()
    dims = {0: torch.export.Dim("steps"), 1: torch.export.Dim("batch")}
    program = torch.export.export(net, (torch.randn(6, 3, 5),), dynamic_shapes=(dims,), strict=strict)
    assert any("rnnfast" in str(node.target) for node in program.graph.nodes)
    for steps, batch in ((6, 3), (9, 5), (2, 2)):
        x = torch.randn(steps, batch, 5)
        torch.testing.assert_close(program.module()(x), net(x))


def test_accelerated_models_compile():
    """And go back."""
    net = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.GRU(8, 17))
    x = torch.randn(6, 3, 5)
    rnnfast.accelerate(net)
    backend, names = recorded()
    same(torch.compile(net, fullgraph=True, backend=backend)(x), net(x))
    assert names()
    rnnfast.restore(net)
    assert type(net[1]) is torch.nn.GRU
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(net, fullgraph=True, backend="eager")(x)


def test_modules_of_torch_are_treated_as_ever():
    """Dynamo still breaks the graph at torch.nn's own, and its switch is where the user left it."""
    assert torch._dynamo.config.allow_rnn is False
    torch.compile(rnnfast.LSTM(5, 17), fullgraph=True, backend="eager")(torch.randn(4, 3, 5))
    assert torch._dynamo.config.allow_rnn is False
    with pytest.raises(torch._dynamo.exc.Unsupported, match="RNN, GRU, or LSTM"):
        torch.compile(torch.nn.LSTM(5, 17), fullgraph=True, backend="eager")(torch.randn(4, 3, 5))
    assert isinstance(rnnfast.LSTM(5, 17), torch.nn.LSTM)


@pytest.mark.parametrize("first", ["rnnfast", "torch._dynamo"])
def test_whichever_is_imported_first(python, first):
    second = "torch._dynamo" if first == "rnnfast" else "rnnfast"
    python(
        f"import {first}, {second}, torch, rnnfast\n"
        "module, x = rnnfast.GRU(5, 17), torch.randn(4, 3, 5)\n"
        "y = torch.compile(module, fullgraph=True, backend='eager')(x)[0]\n"
        "assert torch.equal(y, module(x)[0])\n"
    )


PATCHED = """
import torch, rnnfast, torch._dynamo
from torch.jit import _recursive
from torch._dynamo.variables.builder import VariableBuilder
from torch.onnx._internal.exporter import _registration
rnnfast.GRU(5, 17)
functions = torch.fx.Tracer.is_leaf_module, _recursive.create_script_module, VariableBuilder.wrap_module
known = [op.fx_target for op in _registration._torchlib_registry.get_torchlib_ops()]
patched = [f.__module__.startswith("rnnfast") for f in functions]
print(*patched, torch.ops.rnnfast.stack.default in known)
"""


@pytest.mark.parametrize("setting", ["", "off"])
def test_one_switch_leaves_torchs_compilers_alone(python, setting):
    assert python(PATCHED, RNNFAST_COMPILERS=setting).stdout.split() == [str(not setting)] * 4


AS_EAGER = """
import torch, rnnfast
torch.manual_seed(0)
x, lengths = torch.randn(3, 4, 5), torch.tensor([4, 0, 2])
reset = torch.rand(3, 4) < 0.3
for module, options in (
    (rnnfast.LSTM(5, 17, batch_first=True), {}),
    (rnnfast.LSTM(5, 17, batch_first=True), {"return_cell_states": True}),
    (rnnfast.GRU(5, 17, batch_first=True, bidirectional=True), {}),
    (rnnfast.GRU(5, 17, batch_first=True, reset_after=False), {}),
    (rnnfast.RNN(5, 17, batch_first=True), {"reset": reset}),
    (rnnfast.GRU(5, 17, batch_first=True), {"lengths": lengths}),
):
    compiled = torch.compile(lambda x: module(x, **options)[0] * 2, backend="eager")
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            got, want = compiled(x), module(x, **options)[0] * 2
        assert torch.equal(got, want) and got.stride() == want.stride()
    assert "_StackBackward" in str(compiled(x).grad_fn.next_functions)
"""


def test_a_graph_breaks_at_modules_and_the_kernels_run(python):
    """Also where torch's compilers are left alone."""
    python(AS_EAGER, RNNFAST_COMPILERS="off")


def test_bad_input_is_refused():
    compiled = torch.compile(rnnfast.GRU(5, 17), backend="eager")
    with pytest.raises(RuntimeError, match="Expected 5, got 6"):
        compiled(torch.randn(4, 3, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_cell
def test_opcheck(cell, dtype):
    """Schema, fake tensors, registration of autograd, and the dispatch under dynamic shapes."""
    make_leaf = {"dtype": dtype, "requires_grad": True}
    for suffix, options in (("", {"num_layers": 2, "bidirectional": True}), ("Cell", {})):
        module = make(rnnfast, cell, 5, 17, suffix=suffix, dtype=dtype, **options)
        lead = () if suffix else (4,)
        x = torch.randn(*lead, 3, 5, **make_leaf)
        h = torch.randn(*lead, 3, 17, **make_leaf)
        c = torch.randn(*lead, 3, 17, **make_leaf) if CELLS[cell].has_c else None
        reset = torch.rand(*x.shape[:-1]) < 0.4
        weights = list(module.parameters())
        for h0, c0, mask, cells in ((None, None, None, False), (h, c, reset, CELLS[cell].has_c)):
            config = module._config(cell_states=cells)
            args = (x, h0, c0, weights, None, mask, *config, None, True)
            tolerances = {"rtol": 2**-6, "atol": 2**-5} if dtype == torch.bfloat16 else {}
            assert set(opcheck(torch.ops.rnnfast.stack.default, args, **tolerances).values()) == {
                "SUCCESS"
            }


@every_cell
def test_what_a_compiled_program_calls(cell):
    """Its calls skip the dispatcher, and must not where somebody listens there."""
    module, x = make(rnnfast, cell, 5, 17), torch.randn(4, 3, 5)
    weights = [p.detach() for p in module.parameters()]
    args = (x, None, None, weights, None, None, *module._config())
    stack = torch.ops.rnnfast.stack.default
    with torch.no_grad():
        want = stack(*args, None, False)
        same(want[0], module(x)[0])
        with torch.profiler.profile() as profile:
            same(stack(*args, None, False), want)
        assert "rnnfast::stack" in [event.key for event in profile.key_averages()]
        seen = []

        class Listen(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                seen.append(func)
                return func(*args, **(kwargs or {}))

        with Listen():
            got = stack(*args, None, False)
        assert seen == [stack]
        same(got, want)

        class Mine(torch.Tensor):
            @classmethod
            def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
                seen.append("mine")
                return func(*torch.utils._pytree.tree_map_only(cls, lambda t: t.plain, args))

        mine = torch.Tensor._make_subclass(Mine, x)
        mine.plain = x
        same(stack(mine, *args[1:], None, False), want)
        assert seen == [stack, "mine"]


@every_cell
@every_suffix
def test_transforms_of_programs(cell, suffix):
    """The dispatcher would take the operator for constant under forward mode, in silence."""
    module = make(rnnfast, cell, 5, 7, suffix=suffix)
    x = torch.randn(*(() if suffix else (4,)), 3, 5)

    def first(out):
        return flatten(out)[0]

    def tangent(run):
        return lambda x: torch.func.jvp(lambda x: first(run(x)), (x,), (x,))[1]

    def gradient(run):
        return lambda x: torch.func.grad(lambda x: first(run(x)).square().sum())(x)

    exported = torch.export.export(module, (x,)).module()
    for transform in (tangent, gradient):
        want = transform(module)(x)
        assert want.abs().max() > 1e-3
        torch.testing.assert_close(transform(exported)(x), want)
        torch._dynamo.reset()
        compiled = torch.compile(transform(module), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), want)


@every_cell
def test_second_derivatives_of_programs(cell):
    module, x = make(rnnfast, cell, 5, 7), torch.randn(4, 3, 5, requires_grad=True)

    def second(run):
        (grad,) = torch.autograd.grad(run(x)[0].square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), [x, *module.parameters()])

    exported = torch.export.export(module, (x.detach(),)).module()
    for name, p in module.named_parameters():  # the same ones
        owner = exported.get_submodule(name.rpartition(".")[0])
        setattr(owner, name.rpartition(".")[2], p)
    want = second(module)
    for run in (exported, torch.compile(module, backend="eager", fullgraph=True)):
        torch.testing.assert_close(second(run), want)


@every_cell
def test_gradients_of_what_was_exported_without(cell):
    module, x = make(rnnfast, cell, 5, 7), torch.randn(4, 3, 5, requires_grad=True)
    with torch.no_grad():
        exported = torch.export.export(module, (x.detach(),)).module()
    got, want = (torch.autograd.grad(run(x)[0].square().sum(), x) for run in (exported, module))
    same(got, want)


def test_only_a_program_with_gradients_keeps_what_backward_needs():
    module, x = rnnfast.GRU(5, 7), torch.randn(4, 3, 5)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            program = torch.export.export(module, (x,))
        (node,) = (n for n in program.graph.nodes if "rnnfast" in str(n.target))
        assert node.args[-1] is grad  # the argument save
        assert grad or not any("clone" in str(n.target) for n in program.graph.nodes)


LOADS = """
import sys, torch, rnnfast
assert "torch._dynamo" not in sys.modules
program, x, y = sys.argv[1:]
assert torch.equal(torch.export.load(program).module()(torch.load(x))[0], torch.load(y))
"""


@pytest.mark.parametrize("first", ["torch", "rnnfast"])
def test_a_saved_program_needs_only_the_import_of_rnnfast(first, python, tmp_path):
    """Its operator is defined when torch loads the program."""
    module, x = rnnfast.LSTM(5, 17), torch.randn(4, 3, 5)
    with torch.no_grad():
        torch.export.save(torch.export.export(module, (x,)), tmp_path / "program.pt2")
        torch.save(x, tmp_path / "x")
        torch.save(module(x)[0], tmp_path / "y")
    python(["-c", f"import {first}; {LOADS}", *(tmp_path / name for name in ("program.pt2", "x", "y"))])
