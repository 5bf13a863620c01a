"""LSTM(coupled_gates=True), whose input gate is what the forget gate leaves; torch.nn has none."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import reference
import rnnfast
from seeds import seed
from twins import flatten, make, states

every_suffix = pytest.mark.parametrize("suffix", ["", "Cell"])

OPTIONS = [
    {},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
    {"bias": False},
    {"proj_size": 7},
    {"num_layers": 3, "proj_size": 7, "bidirectional": True},
]


def problem(module, suffix="", batch=3):
    lead = () if suffix else (4,)
    return torch.randn(*lead, batch, module.input_size)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_layers(options):
    module = make(rnnfast, "lstm_coupled", 5, 17, dtype=torch.float64, **options)
    numbers = module.num_layers * (2 if module.bidirectional else 1)
    x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    h = torch.randn(numbers, 3, module.proj_size or 17, dtype=torch.float64)
    c = torch.randn(numbers, 3, 17, dtype=torch.float64)
    y, final = module(x.transpose(0, 1) if module.batch_first else x, (h, c))
    got = [y.transpose(0, 1) if module.batch_first else y, *final]
    want = reference.stack("lstm_coupled", module, x, h, c)
    leaves = [x, *module.parameters()]
    grads = [torch.autograd.grad(sum(t.sum() for t in outputs), leaves) for outputs in (got, want)]
    for a, b in zip([*got, *grads[0]], [*want, *grads[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@every_suffix
def test_it_is_the_lstm_whose_input_gate_is_that(suffix):
    """An LSTM computes the same where the weights of i are those of f negated: 1 - s(a) = s(-a)."""
    coupled = make(rnnfast, "lstm_coupled", 5, 17, suffix=suffix)
    lstm = make(rnnfast, "lstm", 5, 17, suffix=suffix)
    with torch.no_grad():
        for ours, theirs in zip(coupled.parameters(), lstm.parameters(), strict=True):
            assert len(ours) == 3 * 17
            theirs.copy_(torch.cat([-ours[:17], ours]))
    x = problem(coupled, suffix)
    for a, b in zip(flatten(coupled(x)), flatten(lstm(x)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


@every_suffix
def test_without_the_option_it_is_torchs(suffix):
    seed(0)
    ours = getattr(rnnfast, "LSTM" + suffix)(5, 17, coupled_gates=False)
    seed(0)
    theirs = getattr(nn, "LSTM" + suffix)(5, 17)
    assert "coupled_gates" not in repr(ours)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


@every_suffix
def test_construction(suffix):
    kind = getattr(rnnfast, "LSTM" + suffix)
    with pytest.raises(TypeError, match="coupled_gates should be of type bool, got: int"):
        kind(3, 4, coupled_gates=1)
    module = kind(3, 4, coupled_gates=True, dtype=torch.float64, device="cpu")
    assert {p.dtype for p in module.parameters()} == {torch.float64}
    bound = 4**-0.5
    assert all(p.abs().max() <= bound and p.std() > bound / 4 for p in module.parameters())
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in module.parameters())
    assert all(p.is_meta for p in kind(3, 4, coupled_gates=True, device="meta").parameters())


@every_suffix
def test_repr_copies_and_state_dict(suffix):
    module = make(rnnfast, "lstm_coupled", 5, 17, suffix=suffix)
    assert "coupled_gates=True" in repr(module)
    x = problem(module, suffix)
    want = flatten(module(x))[0]
    other = make(rnnfast, "lstm_coupled", 5, 17, suffix=suffix)
    other.load_state_dict(module.state_dict())
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), other):
        assert torch.equal(flatten(twin(x))[0], want)
    with pytest.raises(RuntimeError, match="size mismatch"):
        module.load_state_dict(make(nn, "lstm", 5, 17, suffix=suffix).state_dict())


@every_suffix
def test_what_torch_cannot_compute_stays(suffix):
    model = nn.Sequential(make(rnnfast, "lstm_coupled", 5, 17, suffix=suffix))
    x = problem(model[0], suffix)
    want = flatten(model(x))[0]
    with pytest.raises(ValueError, match="with coupled_gates=True, which torch"):
        rnnfast.restore(model)
    with pytest.raises(RuntimeError, match=r"LSTM.* with coupled_gates=True is not in torch\.nn"):
        torch.jit.script(model)
    assert torch.equal(flatten(model(x))[0], want)


@every_suffix
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(suffix, dtype):
    module = make(rnnfast, "lstm_coupled", 5, 17, suffix=suffix)
    x = problem(module, suffix)
    want = flatten(module(x))
    for a, b in zip(flatten(module.to(dtype)(x.to(dtype))), want, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.float(), b, rtol=0, atol=8 * torch.finfo(dtype).eps)


@every_suffix
def test_bad_arguments_raise_as_torchs(suffix):
    ours = make(rnnfast, "lstm_coupled", 5, 17, suffix=suffix)
    theirs = make(nn, "lstm", 5, 17, suffix=suffix)
    lead = () if suffix else (1,)
    x, hx = problem(ours, suffix), states("lstm", *lead, 3, 17)
    wide = states("lstm", *lead, 3, 18)
    for args in ((x[..., 1:],), (x, wide), (x, hx[0]), (x.double(), hx), (x[None, None],), (None,)):
        raised = []
        for module in (ours, theirs):
            with pytest.raises(Exception) as error:  # noqa: PT011 - whatever torch raises
                module(*args)
            raised.append((error.type, str(error.value).split("\n")[0]))
        assert raised[0] == raised[1]


@every_suffix
def test_what_no_kernel_covers_runs_on_torchs_operators(suffix):
    """Under a transform, and on the meta device."""
    module = make(rnnfast, "lstm_coupled", 5, 17, suffix=suffix)
    x = problem(module, suffix)
    mapped = torch.func.vmap(lambda x: flatten(module(x))[0])(torch.stack([x, x]))
    torch.testing.assert_close(mapped[1], flatten(module(x))[0], rtol=1e-5, atol=2e-6)
    shapes = [t.shape for t in flatten(module(x))]
    assert [t.shape for t in flatten(module.to("meta")(x.to("meta")))] == shapes


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_states_of_a_call_that_no_kernel_covers(options):
    """A layer of torch with the same options checks their shapes and dtypes."""

    class Mine(torch.Tensor):
        pass

    module = make(rnnfast, "lstm_coupled", 5, 17, dtype=torch.float64, **options)
    numbers = module.num_layers * (2 if module.bidirectional else 1)
    batch = 4 if module.batch_first else 3
    widths = (module.proj_size or 17, 17)
    hx = tuple(torch.randn(numbers, batch, width, dtype=torch.float64) for width in widths)
    x = problem(module).double()
    for a, b in zip(flatten(module(x.as_subclass(Mine), hx)), flatten(module(x, hx)), strict=True):
        torch.testing.assert_close(a.as_subclass(torch.Tensor), b)
