"""rnnfast's classes stand where torch.nn's stood: same construction, same state, same answers."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

import reference
import rnnfast
from reference import CELLS
from seeds import seed
from twins import LAYERS, assert_twins_agree, flatten, make, states, torch_has_half_lstm, twins

every_layer = pytest.mark.parametrize("cell", LAYERS)
every_cell = pytest.mark.parametrize("cell", CELLS)
every_suffix = pytest.mark.parametrize("suffix", ["", "Cell"], ids=["layer", "cell"])

OPTIONS = [
    {},
    {"bias": False},
    {"num_layers": 3},
    {"bidirectional": True},
    {"batch_first": True},
    {"num_layers": 2, "bidirectional": True, "bias": False, "batch_first": True},
    {"num_layers": 2, "dropout": 0.5},
    {"num_layers": 2, "dropout": 0.5, "batch_first": True},
    {"dtype": torch.float64},
]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=str)


def args_for(cell, module, unbatched=False):
    """An input, and states, as this module takes them."""
    dtype = module.weight_ih_l0.dtype
    shape = (3, 4) if module.batch_first else (4, 3)
    count = module.num_layers * (2 if module.bidirectional else 1)
    if unbatched:
        return torch.randn(4, 5, dtype=dtype), states(cell, count, 17, dtype=dtype)
    return torch.randn(*shape, 5, dtype=dtype), states(cell, count, 3, 17, dtype=dtype)


@every_layer
@every_option
@pytest.mark.parametrize("unbatched", [False, True], ids=["", "unbatched"])
@pytest.mark.parametrize("hx", [False, True], ids=["", "hx"])
def test_layers_agree_with_torch(cell, options, unbatched, hx):
    ours, theirs = twins(cell, 5, 17, **options)
    x, state = args_for(cell, ours, unbatched)
    args = (x, state) if hx else (x,)
    assert_twins_agree(ours, theirs, *args)  # in training, with dropout's masks from one seed
    ours.eval(), theirs.eval()
    assert_twins_agree(ours, theirs, *args)
    with torch.no_grad():
        for a, b in zip(flatten(ours(*args)), flatten(theirs(*args)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)
            assert a.is_contiguous() or not b.is_contiguous()  # .view() works where it did


@every_layer
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("unbatched", [False, True], ids=["", "unbatched"])
@pytest.mark.parametrize("hx", [False, True], ids=["", "hx"])
def test_cells_agree_with_torch(cell, bias, unbatched, hx):
    ours, theirs = twins(cell, 5, 17, suffix="Cell", bias=bias)
    lead = () if unbatched else (3,)
    args = (torch.randn(*lead, 5), states(cell, *lead, 17)) if hx else (torch.randn(*lead, 5),)
    assert_twins_agree(ours, theirs, *args)


@pytest.mark.parametrize("options", OPTIONS[:-3], ids=str)
@pytest.mark.parametrize("unbatched", [False, True], ids=["", "unbatched"])
def test_original_gru_layers(options, unbatched):
    module = make(rnnfast, "gru_original", 5, 17, **options)
    x, h = args_for("gru", module, unbatched)
    y, h_n = module(x, h)
    time = 0 if unbatched or not module.batch_first else 1
    x, h = (x[:, None], h[:, None]) if unbatched else (x.movedim(time, 0), h)
    want_y, want_h, _ = reference.stack("gru_original", module, x, h, h)
    want_y, want_h = (want_y[:, 0], want_h[:, 0]) if unbatched else (want_y.movedim(0, time), want_h)
    torch.testing.assert_close(y, want_y, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(h_n, want_h, rtol=1e-5, atol=2e-6)


def test_original_gru_is_another():
    """And reset_after=True, by name, is torch's."""
    x = torch.randn(4, 3, 5)
    after, default, before = (
        make(rnnfast, "gru", 5, 17, **options)(x)[0]
        for options in ({"reset_after": True}, {}, {"reset_after": False})
    )
    assert torch.equal(after, default)
    assert (before - default).abs().max() > 1e-3


@every_layer
@every_suffix
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_agrees_with_torch(cell, suffix, dtype):
    ours, theirs = (m.to(dtype) for m in twins(cell, 5, 17, suffix=suffix))
    x = torch.randn(*(() if suffix else (4,)), 3, 5).to(dtype)
    eps = torch.finfo(dtype).eps
    for a, b in zip(flatten(ours(x)), flatten(theirs(x)), strict=True):
        torch.testing.assert_close(a, b, rtol=4 * eps, atol=4 * eps)
    if cell == "rnn_relu":
        return  # its derivative jumps where a rounding takes its argument past zero
    got, want = (
        torch.autograd.grad(flatten(m(x))[0].float().sum(), list(m.parameters()))
        for m in (ours, theirs)
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=8 * eps, atol=8 * eps)


@every_suffix
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_of_the_original_gru(suffix, dtype):
    module = make(rnnfast, "gru_original", 5, 17, suffix=suffix)
    x = torch.randn(*(() if suffix else (4,)), 3, 5)
    want = flatten(module(x))[0]
    got = flatten(module.to(dtype)(x.to(dtype)))[0]
    assert got.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.float(), want, rtol=0, atol=8 * eps)


@every_layer
@every_suffix
def test_autocast_agrees_with_torch(cell, suffix):
    if cell == "lstm" and not suffix and not torch_has_half_lstm():
        pytest.skip("torch has no LSTM in half precision on this processor")
    ours, theirs = twins(cell, 5, 17, suffix=suffix)
    x = torch.randn(*(() if suffix else (4,)), 3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = flatten(ours(x)), flatten(theirs(x))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-6, atol=2**-6)  # compares the dtypes too
    sum(o.float().sum() for o in got).backward()
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters())


@every_layer
@every_suffix
def test_meta_device(cell, suffix):
    ours, theirs = twins(cell, 5, 17, suffix=suffix, device="meta")
    x = torch.empty(*(() if suffix else (4,)), 3, 5, device="meta")
    for a, b in zip(flatten(ours(x)), flatten(theirs(x)), strict=True):
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


@every_layer
@every_suffix
def test_same_seed_same_weights(cell, suffix):
    ours, theirs = twins(cell, 5, 17, suffix=suffix)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
    before = torch.get_rng_state()  # nor may a constructor draw more, or a forward draw at all
    ours(torch.randn(*(() if suffix else (4,)), 3, 5).zero_())
    torch.set_rng_state(before)
    seed(0)
    make(torch.nn, cell, 5, 17, suffix=suffix)
    after_theirs = torch.rand(1)
    make(rnnfast, cell, 5, 17, suffix=suffix)
    assert torch.equal(torch.rand(1), after_theirs)


@every_layer
@every_option
def test_forward_draws_as_torchs(cell, options):
    """Only dropout draws random numbers, and as many as torch's: the next draw is the same."""
    draws = []
    for module in twins(cell, 5, 17, **options):
        x, _ = args_for(cell, module)
        seed(3)
        module(x)
        draws.append(torch.rand(1))
    assert torch.equal(*draws)


@every_layer
@every_suffix
def test_construction(cell, suffix):
    ours, theirs = twins(cell, 5, 17, suffix=suffix, bias=False)
    assert isinstance(ours, type(theirs))
    assert type(ours).__name__ == type(theirs).__name__
    assert repr(ours) == repr(theirs)
    if not suffix:
        ours, theirs = twins(
            cell, 5, 17, num_layers=2, bidirectional=True, dropout=0.25, batch_first=True
        )
        assert repr(ours) == repr(theirs)
        for name in ("mode", "num_layers", "dropout", "all_weights", "proj_size"):
            assert str(getattr(ours, name)) == str(getattr(theirs, name))


@pytest.mark.parametrize("cell", LAYERS)
def test_positional_arguments(cell):
    """nn.RNN takes nonlinearity as its fourth, the others bias; cells take bias as their third."""
    kind = CELLS[cell].layer
    for args in [(5, 7, 2, "tanh" if kind == "RNN" else False), (5, 7, 1)]:
        ours, theirs = (getattr(package, kind)(*args) for package in (rnnfast, nn))
        assert repr(ours) == repr(theirs)
    ours, theirs = (getattr(package, kind + "Cell")(5, 7, False) for package in (rnnfast, nn))
    assert repr(ours) == repr(theirs)
    theirs = list(inspect.signature(getattr(nn, kind).forward).parameters)
    ours = inspect.signature(getattr(rnnfast, kind).forward).parameters
    assert list(ours)[: len(theirs)] == theirs
    assert all(ours[name].default is not inspect.Parameter.empty for name in list(ours)[2:])


@every_layer
@pytest.mark.parametrize("bias", ["relu", "", [], 1, None], ids=str)
def test_any_object_as_the_bias_of_a_cell(cell, bias):
    """Torch asks only whether it is true; a nonlinearity in its place is an easy slip."""
    ours, theirs = twins(cell, 5, 17, suffix="Cell", bias=bias)
    assert_twins_agree(ours, theirs, torch.randn(3, 5))


@pytest.mark.parametrize("nonlinearity", [None, 1, "garbage"], ids=str)
def test_unknown_nonlinearity(nonlinearity):
    messages = []
    for package in (rnnfast, nn):
        with pytest.raises(RuntimeError, match="Unknown nonlinearity") as error:
            package.RNNCell(5, 7, nonlinearity=nonlinearity)(torch.randn(3, 5))
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_forward_by_keyword():
    ours, theirs = twins("gru", 5, 17)
    x, h = torch.randn(4, 3, 5), torch.randn(1, 3, 17)
    torch.testing.assert_close(ours(input=x, hx=h)[0], theirs(input=x, hx=h)[0])


@every_suffix
def test_reset_after_in_repr_and_copies(suffix):
    module = make(rnnfast, "gru_original", 5, 17, suffix=suffix)
    assert "reset_after=False" in repr(module)
    assert "reset_after" not in repr(make(rnnfast, "gru", 5, 17, suffix=suffix))
    x = torch.randn(*(() if suffix else (4,)), 3, 5)
    want = flatten(module(x))[0]
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(flatten(twin(x))[0], want)


@every_layer
@every_suffix
def test_state_dict_both_ways(cell, suffix):
    ours, theirs = twins(cell, 5, 17, suffix=suffix)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    with torch.no_grad():
        for p in theirs.parameters():
            p.mul_(2)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(*(() if suffix else (4,)), 3, 5)
    assert_twins_agree(ours, theirs, x)
    other = make(torch.nn, cell, 5, 17, suffix=suffix)
    other.load_state_dict(ours.state_dict(), strict=True)
    assert_twins_agree(ours, other, x)


@every_cell
@every_suffix
def test_copies(cell, suffix):
    """Of a module that has been used: nothing cached may be shared or fail to pickle."""
    module = make(rnnfast, cell, 5, 17, suffix=suffix)
    x = torch.randn(*(() if suffix else (4,)), 3, 5)
    want = flatten(module(x))[0].detach()
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    copies = [
        copy.deepcopy(module),
        copy.copy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(file, weights_only=False),
    ]
    for twin in copies:
        assert type(twin) is type(module)
        assert torch.equal(flatten(twin(x))[0], want)
    with torch.no_grad():
        for p in copies[0].parameters():
            p.zero_()
    assert torch.equal(flatten(module(x))[0], want)
    assert not torch.equal(flatten(copies[0](x))[0], want)


def set_by_optimizer(module):
    module(torch.randn(4, 3, 5))[0].sum().backward()
    torch.optim.SGD(module.parameters(), lr=0.5).step()


def set_by_load_state_dict(module):
    module.load_state_dict({n: v * 1.5 for n, v in module.state_dict().items()})


def set_by_assign(module):
    state = {n: v * 1.5 for n, v in module.state_dict().items()}
    module.load_state_dict(state, assign=True)


def set_by_data(module):
    module.weight_hh_l0.data = module.weight_hh_l0.data * 1.5


def set_in_data(module):
    module.weight_ih_l0.data[0, 0] += 1  # raises no version counter


def set_in_numpy(module):
    module.weight_hh_l0.detach().numpy()[-1, -1] += 1
    module.bias_hh_l0.detach().numpy()[-1] += 1


def set_by_attribute(module):
    module.weight_hh_l0 = nn.Parameter(module.weight_hh_l0.detach() * 1.5)


def set_by_reset(module):
    module.reset_parameters()


CHANGES = [value for name, value in sorted(globals().items()) if name.startswith("set_")]


@every_layer
@pytest.mark.parametrize("change", CHANGES)
def test_weights_are_never_stale(cell, change):
    ours, _ = twins(cell, 5, 17)
    x = torch.randn(4, 3, 5)
    with torch.no_grad():
        before = ours(x)[0]
        ours(x)
    change(ours)
    theirs = make(torch.nn, cell, 5, 17)
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        assert not torch.equal(ours(x)[0], before)
        torch.testing.assert_close(ours(x)[0], theirs(x)[0], rtol=1e-5, atol=2e-6)


@every_layer
def test_weights_in_inference_mode_are_not_stale(cell):
    """Inference tensors have no version counter at all."""
    with torch.inference_mode():
        ours, theirs = twins(cell, 5, 17)
        x = torch.randn(4, 3, 5)
        ours(x)
        for module in (ours, theirs):
            module.weight_hh_l0.mul_(1.5)
        torch.testing.assert_close(ours(x)[0], theirs(x)[0], rtol=1e-5, atol=2e-6)


@every_layer
def test_functional_call_and_dropped_weights(cell):
    """Weights handed in, or replaced by plain tensors as weight dropout does, take gradients."""
    ours, theirs = twins(cell, 5, 17)
    x, grads = torch.randn(4, 3, 5), []
    for module in (ours, theirs):
        given = {name: (1.5 * p).requires_grad_() for name, p in module.state_dict().items()}
        y, _ = torch.func.functional_call(module, given, (x,))
        raw = nn.Parameter(module.weight_hh_l0.detach().clone())
        del module._parameters["weight_hh_l0"]
        module.weight_hh_l0 = raw * 0.5
        loss = y.square().sum() + module(x)[0].sum()
        grads.append([y, *torch.autograd.grad(loss, [raw, *given.values()])])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=5e-6)


@every_layer
def test_parametrized_weights(cell):
    results = []
    for module in twins(cell, 5, 17):
        nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
        x = torch.linspace(-1, 1, 60).view(4, 3, 5)
        y, _ = module(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(module.parameters()))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=5e-6)


@every_layer
@every_suffix
def test_hooks_run(cell, suffix):
    module = make(rnnfast, cell, 5, 17, suffix=suffix)
    seen = []
    module.register_forward_pre_hook(lambda m, args: seen.append("before"))
    module.register_forward_hook(lambda m, args, out: seen.append("after"))
    module.register_full_backward_hook(lambda m, i, o: seen.append("backward"))
    module.weight_hh_l0.register_hook(lambda g: seen.append("weight")) if not suffix else None
    x = torch.randn(*(() if suffix else (4,)), 3, 5, requires_grad=True)
    flatten(module(x))[0].sum().backward()
    assert seen[:2] == ["before", "after"]
    assert set(seen[2:]) == {"backward"} | (set() if suffix else {"weight"})


@every_layer
@every_suffix
def test_moves_between_dtypes(cell, suffix):
    ours, theirs = (m.double() for m in twins(cell, 5, 17, suffix=suffix))
    x = torch.randn(*(() if suffix else (4,)), 3, 5, dtype=torch.float64)
    assert_twins_agree(ours, theirs, x)
    ours.float(), theirs.float()
    assert_twins_agree(ours, theirs, x.float())


@every_layer
@pytest.mark.parametrize("name", ["weight_ih_l1", "weight_hh_l1", "bias_hh_l1"])
def test_weights_of_a_later_layer_may_have_any_strides(cell, name):
    ours, theirs = twins(cell, 4, 4, num_layers=2)
    for module in (ours, theirs):
        weight = getattr(module, name)
        weight.data = weight.data.repeat_interleave(2, -1)[..., ::2]
    assert_twins_agree(ours, theirs, torch.randn(5, 2, 4))
    with torch.no_grad():
        got, want = (module(torch.ones(5, 2, 4))[0] for module in (ours, theirs))
    torch.testing.assert_close(got, want)


@every_layer
def test_user_subclasses(cell):
    """A subclass with its own attributes and a forward that calls super()."""
    base = getattr(rnnfast, CELLS[cell].layer)

    class Mine(base):
        def forward(self, x, hx=None):
            y, state = super().forward(2 * x, hx)
            return y + 1, state

    seed(0)
    mine = Mine(5, 17, **dict(CELLS[cell].options))
    plain, x = make(rnnfast, cell, 5, 17), torch.randn(4, 3, 5)
    assert torch.equal(mine(x)[0], plain(2 * x)[0] + 1)


def test_dropout_warning_is_torchs():
    messages = []
    for package in (rnnfast, nn):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            package.LSTM(3, 4, dropout=0.5)
        messages.append([(w.category, str(w.message)) for w in caught])
    assert messages[0] == messages[1]


def test_dropout_masks_in_training_only():
    module = make(rnnfast, "lstm", 5, 17, num_layers=2, dropout=0.5)
    x = torch.randn(4, 3, 5)
    first, second = module(x)[0], module(x)[0]
    assert not torch.equal(first, second)
    module.eval()
    assert torch.equal(module(x)[0], module(x)[0])
    everything = make(rnnfast, "lstm", 5, 17, num_layers=2, dropout=1.0)
    theirs = make(torch.nn, "lstm", 5, 17, num_layers=2, dropout=1.0)
    assert_twins_agree(everything, theirs, x)
