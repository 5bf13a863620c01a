"""rnnfast.init: each function on every module, and what it promises."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import rnnfast
from rnnfast import init

MODULES = {
    "rnn": lambda **o: rnnfast.RNN(5, 8, 2, bidirectional=True, **o),
    "relu": lambda **o: rnnfast.RNN(5, 8, nonlinearity="relu", **o),
    "relu_cell": lambda **o: rnnfast.RNNCell(5, 8, nonlinearity="relu", **o),
    "lstm": lambda **o: rnnfast.LSTM(5, 8, 2, **o),
    "projected": lambda **o: rnnfast.LSTM(5, 8, proj_size=3, **o),
    "coupled": lambda **o: rnnfast.LSTM(5, 8, coupled_gates=True, **o),
    "lstm_cell": lambda **o: rnnfast.LSTMCell(5, 8, **o),
    "gru": lambda **o: rnnfast.GRU(5, 8, **o),
    "gru_original": lambda **o: rnnfast.GRU(5, 8, reset_after=False, **o),
    "torch_lstm": lambda **o: nn.LSTM(5, 8, **o),
    "torch_lstm_cell": lambda **o: nn.LSTMCell(5, 8, **o),
    "torch_gru_cell": lambda **o: nn.GRUCell(5, 8, **o),
    "torch_relu": lambda **o: nn.RNN(5, 8, nonlinearity="relu", **o),
    "torch_relu_cell": lambda **o: nn.RNNCell(5, 8, nonlinearity="relu", **o),
}
LSTMS = ("lstm", "projected", "coupled", "lstm_cell", "torch_lstm", "torch_lstm_cell")
GRUS = ("gru", "gru_original", "torch_gru_cell")
RELUS = ("relu", "relu_cell", "torch_relu", "torch_relu_cell")


def named(module, start):
    return [p for name, p in module.named_parameters() if name.startswith(start)]


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("bias", [True, False])
def test_orthogonal(name, bias):
    module = MODULES[name](bias=bias)
    assert init.orthogonal_(module, gain=2) is module
    for w in named(module, "weight_hh"):
        for block in w.split(8):
            width = block.size(1)
            torch.testing.assert_close(block.T @ block, 4 * torch.eye(width), atol=1e-5, rtol=0)


def test_orthogonal_takes_a_generator():
    made = []
    for seed in (3, 3, 4):
        generator = torch.Generator().manual_seed(seed)
        made.append(init.orthogonal_(rnnfast.GRU(5, 8), generator=generator).weight_hh_l0)
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


@pytest.mark.parametrize("name", RELUS)
def test_identity_keeps_the_state(name):
    module = init.identity_(MODULES[name]())
    h = torch.rand(1, 3, 8)
    for w_ih in named(module, "weight_ih"):
        nn.init.zeros_(w_ih)
    x = torch.randn(3, 5)
    out = module(x, h[0]) if "cell" in name else module(x.expand(20, 3, 5), h)[0][-1]
    assert out.equal(h[0])


@pytest.mark.parametrize("name", LSTMS)
def test_forget_bias(name):
    module = MODULES[name]()
    before = {n: p.clone() for n, p in module.named_parameters()}
    init.forget_bias_(module, 1.5)
    block = 0 if name == "coupled" else 1  # torch's order is i, f, g, o
    for b_ih, b_hh in zip(named(module, "bias_ih"), named(module, "bias_hh"), strict=True):
        total = b_ih + b_hh
        assert (total.split(8)[block] == 1.5).all()
    for n, p in module.named_parameters():
        rest = torch.ones_like(p, dtype=torch.bool)
        if n.startswith("bias"):
            rest[8 * block : 8 * block + 8] = False
        assert p[rest].equal(before[n][rest]), n


@pytest.mark.parametrize("name", LSTMS + GRUS)
def test_chrono_remembers_as_long_as_it_says(name):
    module = init.chrono_(MODULES[name](), 100, torch.Generator().manual_seed(0))
    again = init.chrono_(MODULES[name](), 100, torch.Generator().manual_seed(0))
    blocks = {"lstm": 4, "coupled": 3}.get(name, 3 if name in GRUS else 4)
    keep = 0 if name == "coupled" else 1  # f of i, f, g, o; z of r, z, n
    for b_ih, b_hh, other in zip(
        named(module, "bias_ih"), named(module, "bias_hh"), named(again, "bias_ih"), strict=True
    ):
        assert b_ih.equal(other)
        assert not b_hh.any()
        steps = b_ih.split(8)[keep].exp()
        assert ((steps >= 1) & (steps <= 99)).all()
        assert steps.max() > 30
        if blocks == 4:
            assert b_ih[:8].equal(-b_ih[8:16])
            assert not b_ih[16:].any()
        else:
            assert not any(part.any() for k, part in enumerate(b_ih.split(8)) if k != keep)


def test_the_shortest_chrono():
    module = init.chrono_(rnnfast.GRU(5, 8), 2)
    assert not module.bias_ih_l0.any()  # the logarithm of 1


def test_frozen_weights_notice():
    module, x = rnnfast.RNN(5, 8, nonlinearity="relu"), torch.randn(1, 1, 5)
    with torch.no_grad(), rnnfast.frozen(module):
        module(x)
        init.identity_(module)
        found = module(x)[0]
    assert found.equal(module(x)[0])


@pytest.mark.parametrize(
    ("function", "good"),
    [("identity_", RELUS), ("forget_bias_", LSTMS), ("chrono_", LSTMS + GRUS)],
)
def test_other_cells_are_refused_and_stay_as_they_are(function, good):
    arguments = (10,) if function == "chrono_" else ()
    for name in MODULES.keys() - set(good):
        module = MODULES[name]()
        before = [p.clone() for p in module.parameters()]
        with pytest.raises(
            ValueError, match=f"{function} is meant for an .*{type(module).__name__} is a"
        ):
            getattr(init, function)(module, *arguments)
        assert all(a.equal(b) for a, b in zip(before, module.parameters(), strict=True))


@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.bfloat16, 0.03), (torch.float16, 0.03), (torch.float64, 1e-14)], ids=str
)
def test_orthogonal_in_other_dtypes(dtype, atol):
    module = init.orthogonal_(rnnfast.GRU(3, 8, dtype=dtype))
    block = module.weight_hh_l0[:8].double()
    torch.testing.assert_close(block.T @ block, torch.eye(8).double(), atol=atol, rtol=0)


@pytest.mark.parametrize("change", ["parametrized", "old weight_norm", "pruned"])
def test_weights_that_are_no_parameters_are_refused(change):
    module = rnnfast.LSTM(5, 8)
    if change == "parametrized":
        nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    elif change == "pruned":
        prune.l1_unstructured(module, "bias_ih_l0", 0.1)
    else:
        with pytest.warns(FutureWarning):
            nn.utils.weight_norm(module, "weight_hh_l0")
    before = [p.clone() for p in module.parameters()]
    for function, arguments in ((init.orthogonal_, ()), (init.forget_bias_, ()), (init.chrono_, (9,))):
        with pytest.raises(ValueError, match=r"_l0 of .*LSTM is not a plain parameter"):
            function(module, *arguments)
    assert all(a.equal(b) for a, b in zip(before, module.parameters(), strict=True))


def test_bad_arguments():
    with pytest.raises(ValueError, match="Linear is not a recurrent module"):
        init.orthogonal_(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"longest is 1\.5"):
        init.chrono_(rnnfast.LSTM(2, 3), 1.5)
    with pytest.raises(ValueError, match="longest is inf"):
        init.chrono_(rnnfast.LSTM(2, 3), float("inf"))
    half = rnnfast.LSTM(2, 3, dtype=torch.float16)
    before = [p.clone() for p in half.parameters()]
    with pytest.raises(ValueError, match=r"longest is 100000, more than .* torch\.float16"):
        init.chrono_(half, 100_000)
    assert all(map(torch.equal, before, half.parameters()))
    for function, arguments in ((init.forget_bias_, ()), (init.chrono_, (10,))):
        with pytest.raises(ValueError, match="needs biases; LSTM has bias=False"):
            function(rnnfast.LSTM(2, 3, bias=False), *arguments)


def test_identity_under_another_default_device():
    module = MODULES["relu"]()
    with torch.device("meta"):
        init.identity_(module, 2.0)
    assert torch.equal(module.weight_hh_l0, 2 * torch.eye(8))
