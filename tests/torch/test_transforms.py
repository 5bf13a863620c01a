"""Tensors and calls that are not plain: traced, compiled, batched, lazy, of a subclass.

Whatever torch.nn's classes take, ours take, and what neither takes must not crash the process.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import reference
import rnnfast
from reference import CELLS
from twins import LAYERS, flatten, make, raised, twins

every_cell = pytest.mark.parametrize("cell", CELLS)
every_layer = pytest.mark.parametrize("cell", LAYERS)
every_suffix = pytest.mark.parametrize("suffix", ["", "Cell"], ids=["layer", "cell"])


def input_for(suffix, *options, steps=4, **kwargs):
    return torch.randn(*(() if suffix else (steps,)), 3, 5, *options, **kwargs)


@every_cell
@every_suffix
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_traced(cell, suffix):
    """A trace that recorded the kernel's answer as a constant would be right only once."""
    module = make(rnnfast, cell, 5, 17, suffix=suffix)
    traced = torch.jit.trace(module, input_for(suffix))
    x = input_for(suffix)
    torch.testing.assert_close(flatten(traced(x))[0], flatten(module(x))[0])


@every_cell
def test_compiled(cell):
    torch._dynamo.reset()
    module = make(rnnfast, cell, 5, 17)
    compiled = torch.compile(module, backend="eager")
    for x in (input_for(""), input_for("", steps=6)):
        x.requires_grad_()
        got, want = compiled(x)[0], module(x)[0]
        torch.testing.assert_close(got, want)
        got, want = (torch.autograd.grad(y.square().sum(), x)[0] for y in (got, want))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.filterwarnings("ignore:The tensor attributes? self._flat_weights")
def test_exported(cell):
    module, x = make(rnnfast, cell, 5, 17), input_for("")
    exported = torch.export.export(module, (input_for(""),)).module()
    torch.testing.assert_close(exported(x)[0], module(x)[0])


@every_cell
@every_suffix
def test_fake_tensors(cell, suffix):
    """They have shapes and no memory."""
    with FakeTensorMode():
        y = flatten(make(rnnfast, cell, 5, 17, suffix=suffix)(input_for(suffix)))[0]
    assert y.shape == (*(() if suffix else (4,)), 3, 17)


@every_layer
def test_dispatch_modes_see_the_operators(cell):
    ours, theirs = twins(cell, 5, 17)
    x, flops = input_for(""), []
    for module in (ours, theirs):
        with FlopCounterMode(display=False) as counter:
            module(x)
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1]
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Watch():
        ours(x)
    assert seen


@every_cell
@every_suffix
@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_traced_by_make_fx(cell, suffix, pre_dispatch):
    """A kernel that nobody saw would be missing from the graph."""
    module, x = make(rnnfast, cell, 5, 17, suffix=suffix), input_for(suffix)
    graph = make_fx(lambda x: flatten(module(x))[0], pre_dispatch=pre_dispatch)(x)
    x = input_for(suffix)
    torch.testing.assert_close(graph(x), flatten(module(x))[0])


@every_cell
@every_suffix
def test_tensor_subclasses_stay(cell, suffix):
    class Mine(torch.Tensor):
        pass

    module, x = make(rnnfast, cell, 5, 17, suffix=suffix), input_for(suffix)
    y = flatten(module(x.as_subclass(Mine)))[0]
    assert type(y) is Mine
    torch.testing.assert_close(y.as_subclass(torch.Tensor), flatten(module(x))[0])


@every_cell
@every_suffix
@pytest.mark.parametrize("size", [1, 5])
def test_negated_views(cell, suffix, size):
    """Memory that holds the negative of what the tensor means: the imaginary part of a conj()."""
    module = make(rnnfast, cell, size, 17, suffix=suffix)
    shape = (*(() if suffix else (4,)), 3, size)
    for x in (
        torch.randn(shape, dtype=torch.complex64).conj().imag,
        torch._neg_view(torch.randn(shape)),
    ):
        assert x.is_neg()
        assert torch.equal(flatten(module(x))[0], flatten(module(x.clone().resolve_neg()))[0])


@every_cell
@every_suffix
def test_tensors_without_memory(cell, suffix):
    """Autograd makes such zeros in forward mode; a kernel would read from address 0."""
    module, shape = make(rnnfast, cell, 5, 17, suffix=suffix), input_for(suffix).shape
    x = torch._efficientzerotensor(shape)
    assert torch.equal(flatten(module(x))[0], flatten(module(torch.zeros(shape)))[0])
    y = flatten(module(torch.zeros(shape)))[0]
    grads = torch.autograd.grad(
        y, list(module.parameters()), torch._efficientzerotensor(y.shape), allow_unused=True
    )
    assert all(g is None or not g.any() for g in grads)


@every_cell
def test_batched_gradients(cell):
    """Rows of a Jacobian at once: is_grads_batched, jacobian(vectorize=True)."""
    module = make(rnnfast, cell, 5, 17, dtype=torch.float64)
    x = input_for("", dtype=torch.float64).requires_grad_()
    y, inputs = module(x)[0], [x, *module.parameters()]
    rows = torch.randn(3, *y.shape, dtype=torch.float64)
    got = torch.autograd.grad(y, inputs, rows, is_grads_batched=True, retain_graph=True)
    for index, row in enumerate(rows):
        want = torch.autograd.grad(y, inputs, row, retain_graph=True)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a[index], b, rtol=1e-11, atol=1e-12)


@every_layer
def test_jacobians_and_hessians(cell):
    ours, theirs = twins(cell, 2, 3, dtype=torch.float64)
    x = torch.randn(3, 2, 2, dtype=torch.float64)
    for transform in (
        lambda m: torch.autograd.functional.jacobian(lambda x: m(x)[0].sum(0), x, vectorize=True),
        lambda m: torch.autograd.functional.hessian(lambda x: m(x)[0].square().sum(), x),
        lambda m: torch.func.jacrev(lambda x: m(x)[0].sum(0))(x),
        lambda m: torch.func.jacfwd(lambda x: m(x)[0].sum(0))(x),
    ):
        torch.testing.assert_close(transform(ours), transform(theirs), rtol=1e-11, atol=1e-12)


@every_cell
def test_forward_mode_of_weights(cell):
    """Dual numbers may come in through any argument."""
    module = make(rnnfast, cell, 5, 17, dtype=torch.float64)
    x, w = input_for("", dtype=torch.float64), module.weight_hh_l0.detach()
    v = torch.randn_like(w)

    def ours(w):
        return torch.func.functional_call(module, {"weight_hh_l0": w}, (x,))[0]

    def formula(w):
        weights = module.weight_ih_l0, w, module.bias_ih_l0, module.bias_hh_l0
        zeros = torch.zeros(3, 17, dtype=torch.float64)
        return reference.layer(cell, x, zeros, zeros, weights)[0]

    got, want = (torch.func.jvp(f, (w,), (v,))[1] for f in (ours, formula))
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


STRANGE = {
    "nested": lambda: torch.nested.nested_tensor([torch.ones(4, 5), torch.ones(4, 5)]),
    "ragged": lambda: torch.nested.nested_tensor([torch.ones(4, 5), torch.ones(3, 5)]),
    "mkldnn": lambda: torch.ones(4, 3, 5).to_mkldnn(),
    "sparse": lambda: torch.ones(4, 3, 5).to_sparse(),
    "sparse csr": lambda: torch.ones(4, 5).to_sparse_csr(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(4, 3, 5), 0.1, 0, torch.qint8),
    "complex": lambda: torch.ones(4, 3, 5, dtype=torch.complex64),
}


@every_layer
@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.filterwarnings("ignore:.*nested tensors", "ignore:.*[Ss]parse CSR", "ignore:.*quint8")
def test_strange_tensors(cell, kind):
    """As torch.nn: the same answer, or an exception of the same type."""
    ours, theirs = twins(cell, 5, 17)
    x = STRANGE[kind]()
    want = raised(lambda: theirs(x))
    got = raised(lambda: ours(x))
    assert (got and got[0]) == (want and want[0])


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("sizes", [(3, 0), (0, 4), (0, 0)], ids=str)
def test_cells_of_no_size(cell, sizes):
    """Cells, unlike layers, may have no inputs or no units in torch.nn."""
    module = make(rnnfast, cell, *sizes, suffix="Cell")
    x = torch.zeros(2, sizes[0], requires_grad=True)
    h = flatten(module(x))[0]
    assert h.shape == (2, sizes[1])
    h.sum().backward()
    assert x.grad.shape == x.shape


def first(out):
    return flatten(out)[0]


def parameters(module):
    return {name: p.detach() for name, p in module.named_parameters()}


@every_cell
@every_suffix
def test_vmap(cell, suffix):
    """Over inputs; over samples of a gradient; over models. torch.nn's own layers know none of them."""
    module, xs = make(rnnfast, cell, 5, 7, suffix=suffix), torch.randn(6, *input_for(suffix).shape)
    for got, x in zip(torch.func.vmap(lambda x: first(module(x)))(xs), xs, strict=True):
        torch.testing.assert_close(got, first(module(x)))

    def loss(weights, x):
        return first(torch.func.functional_call(module, weights, (x,))).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters(module), xs)
    for k, x in enumerate(xs):
        want = torch.autograd.grad(first(module(x)).square().sum(), list(module.parameters()))
        for (name, _), b in zip(module.named_parameters(), want, strict=True):
            torch.testing.assert_close(grads[name][k], b, rtol=1e-4, atol=1e-5)

    models = [make(rnnfast, cell, 5, 7, suffix=suffix) for _ in range(3)]
    for model in models:
        for p in model.parameters():
            torch.nn.init.normal_(p)
    stacked, _ = torch.func.stack_module_state(models)
    base = make(rnnfast, cell, 5, 7, suffix=suffix, device="meta")
    outputs = torch.func.vmap(
        lambda weights: first(torch.func.functional_call(base, weights, (xs[0],)))
    )(stacked)
    for got, model in zip(outputs, models, strict=True):
        torch.testing.assert_close(got, first(model(xs[0])), rtol=1e-4, atol=1e-5)


@every_cell
@every_suffix
def test_forward_mode_in_float32(cell, suffix):
    """Which torch.nn.LSTM cannot: oneDNN has no such formula."""
    module, x = make(rnnfast, cell, 5, 7, suffix=suffix), input_for(suffix)
    wide = make(rnnfast, cell, 5, 7, suffix=suffix, dtype=torch.float64)
    wide.load_state_dict(module.state_dict())
    v = torch.randn_like(x)
    got = torch.func.jvp(lambda x: first(module(x)), (x,), (v,))[1]
    step = 1e-6 * v.double()
    want = (first(wide(x.double() + step)) - first(wide(x.double() - step))) / 2e-6
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    rows = torch.func.jacfwd(lambda x: first(module(x)).sum(0))(x)
    torch.testing.assert_close(
        rows, torch.func.jacrev(lambda x: first(module(x)).sum(0))(x), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("cell", ["rnn_tanh", "gru"])
def test_expanded_weights(cell):
    """Gradients of each sample, where torch.nn gives them: not for its LSTM, nor for its cells."""
    module = make(rnnfast, cell, 5, 7, batch_first=True)
    x = torch.randn(3, 4, 5)
    want = []
    for one in x.split(1):
        want.append(torch.autograd.grad(module(one)[0].square().sum(), list(module.parameters())))
    call = call_for_per_sample_grads(module, batch_size=3)
    call(x)[0].square().sum().backward()
    for k, p in enumerate(module.parameters()):
        torch.testing.assert_close(p.grad_sample, torch.stack([grads[k] for grads in want]))


@every_layer
@every_suffix
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
def test_quantized_by_torch_fx(cell, suffix):
    """The module is left as it is, and the modules around it are quantized."""
    from torch.ao.quantization import get_default_qconfig_mapping, quantize_fx

    is_single = suffix == "Cell" and not CELLS[cell].has_c

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = make(rnnfast, cell, 5, 7, suffix=suffix)
            self.head = torch.nn.Linear(7, 3)

        def forward(self, x):
            out = self.rnn(x)
            return self.head(out if is_single else out[0])

    net, x = Net().eval(), input_for(suffix)
    prepared = quantize_fx.prepare_fx(net, get_default_qconfig_mapping(), (x,))
    prepared(x)
    quantized = quantize_fx.convert_fx(prepared)
    assert type(quantized.rnn) is type(net.rnn)
    assert type(quantized.head) is not torch.nn.Linear
    torch.testing.assert_close(quantized(x), net(x), atol=0.05, rtol=0)
