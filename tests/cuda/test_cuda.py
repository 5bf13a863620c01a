"""The CUDA wing: on a device where there is one, and always on an emulated one.

The emulated device (tests/support/cuda_on_cpu) runs the same kernels, bindings and launches, with
fibers on the CPU in the place of CUDA threads, and takes CPU tensors.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import pytest
import torch

import cuda_on_cpu
import reference
import rnnfast
from rnnfast.stack import autograd, cuda, cuda_plans, cuda_switch
from rnnfast.stack import reference as in_torch
from rnnfast.stack.config import Inputs, StackConfig

TIERS = ["block", "cluster", "grid"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
GATES = {name: cell.gates for name, cell in reference.CELLS.items()}


@pytest.fixture(params=["emulated", "cuda"])
def device(request, monkeypatch):
    """A device to put tensors on, with the CUDA wing ready for it."""
    extension = rnnfast._native._cuda
    if request.param == "emulated":
        extension = request.getfixturevalue("emulated")
    elif extension is None:
        pytest.skip("rnnfast was built without CUDA")
    elif not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    cuda_on_cpu.use(extension, monkeypatch)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return "cpu" if request.param == "emulated" else "cuda"


@dataclass(frozen=True)
class Case:
    cell: str
    T: int
    B: int
    I: int
    H: int
    dtype: torch.dtype = torch.float32
    layers: int = 1
    directions: int = 1
    batch_first: bool = False
    bias: bool = True
    packed: bool = False
    reset: bool = False
    states: bool = True

    @property
    def config(self) -> StackConfig:
        """Without cell states; run() asks for them."""
        sizes = (self.layers, self.directions, self.bias)
        return StackConfig(self.cell, *sizes, batch_first=self.batch_first)

    @property
    def full_config(self) -> StackConfig:
        return self.config._replace(cell_states=reference.CELLS[self.cell].has_c)

    def make(self):
        """float64 tensors: inputs, batch sizes and resets."""
        random = torch.Generator().manual_seed(zlib.crc32(str(self).encode()))

        def normal(*shape):
            return torch.randn(shape, generator=random, dtype=torch.float64)

        rows, k = GATES[self.cell] * self.H, self.H**-0.5
        weights = []
        for layer in range(self.layers):
            inputs = self.I if layer == 0 else self.directions * self.H
            for _ in range(self.directions):
                shapes = [(rows, inputs), (rows, self.H)] + [(rows,)] * (2 * self.bias)
                weights += [(2 * torch.rand(s, generator=random).double() - 1) * k for s in shapes]
        sizes = None
        if self.packed:
            lengths = torch.randint(1, self.T + 1, (self.B,), generator=random)
            lengths[0] = self.T
            sizes = torch.stack([(lengths > t).sum() for t in range(self.T)])
            x = normal(int(sizes.sum()), self.I)
        else:
            x = normal(*((self.B, self.T) if self.batch_first else (self.T, self.B)), self.I)
        shape = (self.layers * self.directions, self.B, self.H)
        h0 = normal(*shape) / 2 if self.states else None
        c0 = normal(*shape) / 2 if self.states and reference.CELLS[self.cell].has_c else None
        reset = torch.rand(x.shape[:-1], generator=random) < 0.3 if self.reset else None
        return [x, h0, c0, *weights], sizes, reset

    def __str__(self) -> str:
        flags = [name for name in ("batch_first", "packed", "reset") if getattr(self, name)]
        flags += ["" if self.bias else "nobias", "" if self.states else "nostates"]
        size = f"T{self.T}B{self.B}I{self.I}H{self.H}L{self.layers}D{self.directions}"
        return "-".join([self.cell, str(self.dtype)[6:], size, *filter(None, flags)])


def to(device, t, dtype=None):
    return t if t is None else t.to(device, dtype)


def run(case, device):
    """Outputs and gradients by the kernels, and the cotangents that were given."""
    inputs, sizes, reset = case.make()
    x, h0, c0, *weights = (to(device, t, case.dtype) for t in inputs)
    given = Inputs(x, h0, c0, weights, sizes, to(device, reset))
    out = cuda.forward(case.full_config, given, save=True)
    assert out is not None, "no plan"
    random = torch.Generator().manual_seed(1)
    grads = [t if t is None else torch.randn(t.shape, generator=random) for t in out[:4]]
    grads = [to(device, t, case.dtype) for t in grads]
    wanted = [t is not None for t in inputs]
    found = cuda.backward(case.full_config, given, out.y, out.saved, grads, wanted)
    return [*out[:4], *found], grads


def by_formula(case, grads, dtype):
    """The same in torch's operators on the CPU."""
    inputs, sizes, reset = case.make()
    leaves = [t if t is None else t.to(case.dtype).to(dtype).requires_grad_() for t in inputs]
    x, h0, c0, *weights = leaves
    out = in_torch.stack(case.full_config, Inputs(x, h0, c0, weights, sizes, reset))
    pairs = [(t, to("cpu", g, dtype)) for t, g in zip(out[:4], grads, strict=True) if t is not None]
    there = [t for t in leaves if t is not None]
    found = iter(torch.autograd.grad([t for t, _ in pairs], there, [g for _, g in pairs]))
    outputs = [t if t is None else t.detach() for t in out[:4]]
    return [*outputs, *(t if t is None else next(found) for t in leaves)]


def check(case, device, unit=None):
    """As exact as torch's operators in the same dtype are, or nearly so."""
    got, grads = run(case, device)
    true = by_formula(case, grads, torch.float64)
    peer = by_formula(case, grads, case.dtype)
    unit = (
        unit or (8 if case.dtype in (torch.float32, torch.float64) else 1) * torch.finfo(case.dtype).eps
    )
    wrong = []
    for i, (g, t, p) in enumerate(zip(got, true, peer, strict=True)):
        assert (g is None) == (t is None), i
        if t is None or t.numel() == 0:
            continue
        assert g.shape == t.shape
        assert g.dtype == case.dtype
        scale = t.abs().max().clamp_min(1e-30)
        error, others = (float((v.cpu().double() - t).abs().max() / scale) for v in (g, p))
        if not error <= 4 * others + unit:  # a NaN is wrong too
            wrong.append(f"number {i} is off by {error:.2e}; torch by {others:.2e}")
    assert not wrong, "; ".join(wrong)


def cases():
    for cell in GATES:
        yield Case(cell, 4, 3, 5, 7)
        yield Case(cell, 3, 9, 2, 33, batch_first=True, bias=False, states=False)
        yield Case(cell, 5, 3, 3, 17, layers=2, directions=2, batch_first=True, reset=True)
        yield Case(cell, 6, 9, 3, 17, layers=2, directions=2, packed=True, reset=True)
        yield Case(cell, 1, 1, 1, 1)
        yield Case(cell, 3, 5, 4, 33, torch.float64, directions=2, packed=True)
        if cell != "rnn_relu":  # rounded sums lie on either side of its kink
            yield Case(cell, 3, 10, 4, 40, torch.bfloat16)
            yield Case(
                cell, 6, 9, 3, 24, torch.bfloat16, layers=2, directions=2, packed=True, reset=True
            )
            yield Case(cell, 3, 10, 4, 40, torch.float16, reset=True)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("case", [*cases()], ids=str)
def test_values_and_gradients(case, tier, device, monkeypatch):
    if tier == "cluster" and case.H < 9:
        pytest.skip("a block has 8 units at least: two would have none")
    monkeypatch.setenv("RNNFAST_CUDA_TIER", tier)
    check(case, device)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm"])
def test_a_weight_of_nan_reaches_what_it_belongs_to(cell, dtype, tier, device, monkeypatch):
    """Where a tile is larger than the layer, the kernels read the first weight and take zero for it."""
    monkeypatch.setenv("RNNFAST_CUDA_TIER", tier)
    case = Case(cell, 1, 3, 4, 9, dtype)
    inputs, _, _ = case.make()
    x, h0, c0, *weights = (to(device, t, dtype) for t in inputs)
    broken = [*weights]
    broken[1] = weights[1].clone()
    broken[1][0, 0] = torch.nan
    out = cuda.forward(case.config, Inputs(x, h0, c0, weights), save=True)
    y = cuda.forward(case.config, Inputs(x, h0, c0, broken)).y
    assert y[..., 0].isnan().all()
    assert torch.equal(y[..., 1:], out.y[..., 1:])

    def d_h0(weights):
        wanted = [t is h0 for t in (x, h0, c0, *weights)]
        given = Inputs(x, h0, c0, weights)
        grads = (torch.ones_like(out.y), None, None, None)
        return cuda.backward(case.config, given, out.y, out.saved, grads, wanted)[1]

    assert d_h0(broken)[..., 0].isnan().all()
    assert torch.equal(d_h0(broken)[..., 1:], d_h0(weights)[..., 1:])


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("tier", TIERS)
def test_tf32(cell, tier, device, monkeypatch):
    monkeypatch.setenv("RNNFAST_CUDA_TIER", tier)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    case = Case(cell, 3, 10, 4, 40)
    check(case, device, unit=4 * 2.0**-10)
    with pytest.raises(AssertionError, match="is off by"):  # or it was not TF32
        check(case, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_blocks(dtype, device, monkeypatch):
    """Weights that no single block could hold."""
    monkeypatch.setenv("RNNFAST_CUDA_TIER", "grid")
    case = Case("lstm", 3, 4, 3, 200, dtype)
    check(case, device)
    x = torch.empty(1, 4, 3, dtype=dtype, device=device)
    assert cuda_plans.plan(case.config, x, 200, 4, backward=True).blocks > 1


@pytest.mark.parametrize("cell", ["lstm", "gru_original"])
def test_many_rows(cell, device, monkeypatch):
    """More rows than the shared memory of the few blocks that a grid can have holds at a time."""
    monkeypatch.setenv("RNNFAST_CUDA_TIER", "grid")
    monkeypatch.setenv("RNNFAST_EMULATED_MULTIPROCESSORS", "1")
    case = Case(cell, 2, 200, 3, 40)
    check(case, device)
    if device == "cpu":
        x = torch.empty(1, 200, 3)
        plan = cuda_plans.plan(case.config, x, 40, 200, backward=False)
        assert plan.chunk < plan.rows


@pytest.mark.parametrize("batch", [2, 9, 19])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tier", ["block", "cluster"])
def test_rows_of_a_group(tier, dtype, batch, device, monkeypatch):
    """Groups of several rows: fewer than a tile has columns, and more."""
    monkeypatch.setenv("RNNFAST_CUDA_TIER", tier)
    monkeypatch.setenv("RNNFAST_EMULATED_MULTIPROCESSORS", "2")
    case = Case("gru", 3, batch, 3, 24, dtype, reset=True)
    check(case, device)
    if device == "cpu":
        x = torch.empty(1, batch, 3, dtype=dtype)
        groups = {"block": 2, "cluster": 1}[tier]
        assert cuda_plans.plan(case.config, x, 24, batch, False).rows == -(-batch // groups)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("cell", GATES)
def test_the_same_bits_again(cell, tier, device, monkeypatch):
    """The emulated threads take their turns in another order each time."""
    monkeypatch.setenv("RNNFAST_CUDA_TIER", tier)
    case = Case(cell, 5, 9, 3, 24, torch.float32, directions=2, packed=True, reset=True)
    first, _ = run(case, device)
    again, _ = run(case, device)
    for a, b in zip(first, again, strict=True):
        assert a is b or torch.equal(a, b)


@pytest.mark.parametrize("cell", GATES)
def test_a_row_does_not_depend_on_the_others(cell, device, monkeypatch):
    monkeypatch.setenv("RNNFAST_CUDA_TIER", "cluster")
    case = Case(cell, 4, 21, 3, 24, torch.float32)
    inputs, _, _ = case.make()
    x, h0, c0, *weights = (to(device, t, case.dtype) for t in inputs)
    whole = cuda.forward(case.config, Inputs(x, h0, c0, weights))
    part = [t if t is None else t[:, 5:7].contiguous() for t in (x, h0, c0)]
    few = cuda.forward(case.config, Inputs(*part, weights))
    assert torch.equal(whole.y[:, 5:7], few.y)


@pytest.fixture
def modules(device, monkeypatch):
    """Has rnnfast's modules run on the device, the emulated one too."""
    if device == "cpu":
        monkeypatch.setattr(
            autograd.ops,
            "forward",
            lambda config, inputs, save=False, packed=None: cuda.forward(config, inputs, save),
        )
        monkeypatch.setattr(autograd.ops, "backward", cuda.backward)
    return device


@pytest.mark.parametrize("cell", GATES)
def test_modules(cell, modules):
    """A whole module, its states and its gradients, against torch's operators in float64."""
    kind = reference.CELLS[cell]
    options = {"num_layers": 2, "bidirectional": True, "batch_first": True, **dict(kind.options)}
    torch.manual_seed(0)
    module = getattr(rnnfast, kind.layer)(3, 9, **options).double().to(modules)
    x = torch.randn(4, 5, 3, dtype=torch.float64, device=modules, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: module(x)[0], x, fast_mode=True)
    y = module(x)[0]
    with torch.backends.cudnn.flags(enabled=False):
        true, _ = module._run(x, None, module._weights(), covered=None)
    torch.testing.assert_close(y, true)
    y.square().sum().backward()
    found = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    true.square().sum().backward()
    for p, g in zip(module.parameters(), found, strict=True):
        torch.testing.assert_close(g, p.grad)


@pytest.mark.parametrize(
    "frozen", ["weight_ih_l0", "weight_hh_l0", "bias_ih_l1", "all of layer 0", "x"]
)
def test_frozen_weights(frozen, modules):
    torch.manual_seed(0)
    module = rnnfast.GRU(3, 9, 2).double().to(modules)
    x = torch.randn(4, 2, 3, dtype=torch.float64, device=modules, requires_grad=frozen != "x")
    module(x)[0].square().sum().backward()
    full = {name: p.grad for name, p in module.named_parameters()}
    module.zero_grad(set_to_none=True)
    off = [
        n for n, _ in module.named_parameters() if n == frozen or (" " in frozen and n.endswith("l0"))
    ]
    for name in off:
        getattr(module, name).requires_grad_(False)
    module(x.detach() if " " in frozen else x)[0].square().sum().backward()
    for name, p in module.named_parameters():
        if name in off:
            assert p.grad is None
        else:
            torch.testing.assert_close(p.grad, full[name])


def test_negative_views(device):
    """Tensors whose memory holds the negative of their values, or nothing."""
    case = Case("gru", 3, 2, 3, 16)
    inputs, _, _ = case.make()
    own = [to(device, t, case.dtype) for t in inputs]
    views = [t if t is None else torch._neg_view(t.neg()) for t in own]
    given = [Inputs(*t[:3], t[3:]) for t in (own, views)]
    outs = [cuda.forward(case.config, inputs, save=True) for inputs in given]
    assert torch.equal(outs[0].y, outs[1].y)
    dy = torch.randn_like(outs[0].y)
    wanted = [t is not None for t in own]

    def back(inputs, out, dy):
        grads = (dy, None, None, None)
        return cuda.backward(case.config, inputs, out.y, out.saved, grads, wanted)

    plain, lazy = back(given[0], outs[0], dy), back(given[1], outs[1], torch._neg_view(dy.neg()))
    for a, b in zip(plain, lazy, strict=True):
        assert a is b or torch.equal(a, b)
    zeros = back(given[0], outs[0], torch._efficientzerotensor(dy.shape, device=device))
    assert all(t is None or not t.any() for t in zeros)


def test_backward_keeps_the_dtypes_of_forward(modules):
    """Autocast that begins after forward, and settings that go before backward."""
    torch.manual_seed(0)
    module = rnnfast.GRU(3, 9, 2).to(modules)
    x = torch.randn(4, 2, 3, device=modules)
    module(x)[0].square().sum().backward()
    before = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    y = module(x)[0].square().sum()
    with torch.autocast(modules, dtype=torch.bfloat16):
        y.backward()
    for p, g in zip(module.parameters(), before, strict=True):
        assert torch.equal(p.grad, g)


def test_settings_gone_before_backward(modules, monkeypatch):
    torch.manual_seed(0)
    module = rnnfast.GRU(3, 9).double().to(modules)
    x = torch.randn(4, 2, 3, dtype=torch.float64, device=modules)
    module(x)[0].square().sum().backward()
    before = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    y = module(x)[0].square().sum()
    monkeypatch.setattr(cuda_switch, "_mode", False)
    y.backward()
    for p, g in zip(module.parameters(), before, strict=True):
        torch.testing.assert_close(p.grad, g)


def test_other_shapes_are_left_to_torch(modules):
    module = rnnfast.GRU(3, 9).to(modules)
    x = torch.randn(4, 2, 3, device=modules)
    for h0 in (torch.zeros(3, 2, 9), torch.zeros(1, 1, 9), torch.zeros(1, 2, 8)):
        with pytest.raises(RuntimeError, match="Expected hidden size"):
            module(x, h0.to(modules))
    with pytest.raises(TypeError, match=r"Tensor of torch\.bool, got list"):
        module(x, reset=[[True]])
    with pytest.raises(TypeError, match=r"Tensor of torch\.bool, got torch\.float32"):
        module(x, reset=torch.zeros(4, 2, device=modules))
    module.weight_hh_l0.data = torch.zeros(27, 5, device=modules)
    with pytest.raises(RuntimeError):
        module(x)


def test_what_a_graph_asks_of_a_plan(device):
    """Dynamo takes the answer for a constant, and looks no further."""
    config = StackConfig("gru")

    def answer(x):
        return x + 1 if cuda_plans.takes(config, x, 64) else x - 1

    x = torch.zeros(2, 3, 4, device=device)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(answer, backend="eager", fullgraph=True)(x), x + 1)


def test_what_no_plan_covers_is_left_to_torch(device):
    config = StackConfig("lstm")
    wide = torch.empty(1, 1, 4, device=device)
    assert cuda_plans.plan(config, wide, 1 << 14, 1, backward=False) is None
    weights = [torch.zeros(s, device=device) for s in [(16, 4), (16, 4), (16,), (16,)]]
    x = torch.zeros(2, 3, 4, device=device)
    assert cuda.forward(config, Inputs(x.int(), None, None, weights)) is None
    assert cuda.forward(config, Inputs(x.half(), None, None, weights)) is None
    assert cuda.forward(config, Inputs(x[:0], None, None, weights)) is None
    assert cuda.forward(config._replace(projected=True), Inputs(x, None, None, weights)) is None
    assert cuda.forward(config, Inputs(x, None, None, weights)) is not None


def test_saved_memory(device):
    """No more than the gates, the cell states and the outputs of inner layers."""
    case = Case("lstm", 3, 4, 3, 16, torch.bfloat16, layers=2)
    inputs, _, _ = case.make()
    x, h0, c0, *weights = (to(device, t, case.dtype) for t in inputs)
    out = cuda.forward(case.config, Inputs(x, h0, c0, weights), save=True)
    each = 2 * (4 * 16 * 2 + 16 * 4) + 16 * 2
    assert out.saved.numel() == 3 * 4 * each
    assert math.prod(out.y.shape) == 3 * 4 * 16
