"""accelerate(model) and restore(model) on models as users have them."""

from __future__ import annotations

import copy
import types

import pytest
import torch
from torch import nn

import rnnfast
from seeds import seed
from twins import LAYERS, assert_twins_agree, make

RECURRENT = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
        self.rnns = nn.ModuleDict(
            {
                "gru": nn.GRU(8, 9, num_layers=2, bidirectional=True),
                "lstm": nn.LSTM(18, 10),
                "rnn": nn.RNN(10, 7, nonlinearity="relu"),
            }
        )
        self.cells = nn.ModuleList([nn.GRUCell(7, 5), nn.LSTMCell(5, 4), nn.RNNCell(4, 3)])
        self.head = nn.Linear(3, 11)

    def forward(self, tokens):
        x = self.encoder(self.embedding(tokens))
        for rnn in self.rnns.values():
            x, _ = rnn(x)
        for cell in self.cells:
            state, steps = None, []
            for step in x:
                state = cell(step, state)
                steps.append(state[0] if isinstance(state, tuple) else state)
            x = torch.stack(steps)
        return self.head(x)


NAMES = {
    "rnns.gru": "GRU",
    "rnns.lstm": "LSTM",
    "rnns.rnn": "RNN",
    "cells.0": "GRUCell",
    "cells.1": "LSTMCell",
    "cells.2": "RNNCell",
}


def quietly(model):
    return rnnfast.accelerate(model, report=None)


def losses(model, optimizer, steps):
    tokens = torch.arange(24).view(6, 4) % 11
    out = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        out.append(loss.item())
    return out


def test_training_continues_with_a_live_optimizer():
    """Adam built before, with moments; after accelerate, the same losses to within rounding."""
    seed(0)
    plain = Tagger()
    model = copy.deepcopy(plain)
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-2) for m in (plain, model)]
    assert losses(plain, optimizers[0], 5) == losses(model, optimizers[1], 5)
    parameters = dict(model.named_parameters())
    assert quietly(model) is model
    assert list(parameters) == [name for name, _ in model.named_parameters()]
    assert all(p is parameters[name] for name, p in model.named_parameters())
    want, got = losses(plain, optimizers[0], 40), losses(model, optimizers[1], 40)
    assert got == pytest.approx(want, rel=1e-3)
    assert got[:5] == pytest.approx(want[:5], rel=1e-6)
    assert got[-1] < got[0] - 0.1  # the optimizer does move what the kernels read


def test_every_class_is_replaced():
    model = Tagger()
    reports = []
    rnnfast.accelerate(model, report=reports.append)
    modules = dict(model.named_modules())
    for name, kind in NAMES.items():
        assert type(modules[name]) is getattr(rnnfast, kind)
    assert type(modules["head"]) is nn.Linear
    (report,) = reports
    entries = {name: (kind, replaced) for name, kind, replaced, _ in report.entries}
    assert entries == {name: (kind, True) for name, kind in NAMES.items()}
    for name in NAMES:
        assert name in str(report)


def textbook_initialiser(module):
    """By exact class, as textbooks have it."""
    if type(module) is nn.LSTM:
        for parameter in module.parameters():
            nn.init.constant_(parameter, 0.5)


def test_the_report_tells_of_tests_by_exact_class():
    """Which leave a replaced module out, in silence; what the report advises helps."""
    model, reports = nn.Sequential(nn.LSTM(3, 4)), []
    rnnfast.accelerate(model, report=reports.append)
    assert isinstance(model[0], nn.LSTM)
    model.apply(textbook_initialiser)
    assert not any((p == 0.5).all() for p in model.parameters())
    text = str(reports[0])
    assert "isinstance(m, torch.nn.LSTM) is still true" in text
    assert "type(m) is torch.nn.LSTM is now false" in text
    assert "before accelerate, or after rnnfast.restore(model)" in text
    assert max(map(len, text.splitlines())) <= 80
    quietly(rnnfast.restore(model).apply(textbook_initialiser))
    assert all((p == 0.5).all() for p in model.parameters())
    assert type(model[0]) is rnnfast.LSTM
    rnnfast.accelerate(model, report=reports.append)
    assert "type(m)" not in str(reports[1])  # nothing was replaced


def test_outputs_and_repr_stay():
    seed(0)
    model = Tagger().double()
    tokens = torch.randint(11, (6, 4))
    want, text = model(tokens), repr(model)
    state = copy.deepcopy(model.state_dict())
    quietly(model)
    torch.testing.assert_close(model(tokens), want, rtol=1e-11, atol=1e-12)
    assert repr(model) == text
    model.load_state_dict(state, strict=True)


@pytest.mark.parametrize("cell", LAYERS)
@pytest.mark.parametrize("suffix", ["", "Cell"])
def test_the_root_itself(cell, suffix):
    ours, theirs = (make(nn, cell, 5, 7, suffix=suffix) for _ in range(2))
    reports = []
    assert rnnfast.accelerate(ours, report=reports.append) is ours
    assert type(ours) is getattr(rnnfast, type(theirs).__name__)
    assert [entry[1:3] for entry in reports[0].entries] == [(type(theirs).__name__, True)]
    assert f"(the model): {type(theirs).__name__}," in str(reports[0])
    assert_twins_agree(ours, theirs, torch.randn(*(() if suffix else (4,)), 3, 5))


class MyLSTM(nn.LSTM):
    def forward(self, x, hx=None):
        y, state = super().forward(x, hx)
        return y + 1, state


def with_own_forward(module):
    module.forward = types.MethodType(lambda self, x: x * 2, module)
    return module


def with_weight_norm(module):
    return nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")


LEFT = {
    "a subclass": lambda: MyLSTM(5, 7),
    "its own forward": lambda: with_own_forward(nn.GRU(5, 7)),
    "parametrized": lambda: with_weight_norm(nn.LSTM(5, 7)),
}


@pytest.mark.parametrize("build", LEFT.values(), ids=list(LEFT))
def test_what_is_left_and_why(build):
    model = nn.ModuleDict({"odd": build(), "plain": nn.GRU(5, 7)})
    kind, x = type(model["odd"]), torch.randn(4, 3, 5)
    want = model["odd"](x)[0]
    reports = []
    rnnfast.accelerate(model, report=reports.append)
    assert type(model["odd"]) is kind
    assert type(model["plain"]) is rnnfast.GRU
    assert torch.equal(model["odd"](x)[0], want)
    entries = {name: (replaced, reason) for name, _, replaced, reason in reports[0].entries}
    assert entries["plain"][0] is True
    assert entries["odd"][0] is False
    assert entries["odd"][1]
    assert entries["odd"][1] in str(reports[0])
    first, *lines = str(reports[0]).splitlines()
    assert "replaced 1 of 2 recurrent modules" in first
    assert [line.split()[:2] for line in lines[:2]] == [["left", "odd:"], ["replaced", "plain:"]]
    assert lines[2] == "isinstance(m, torch.nn.GRU) is still true."


def test_reasons_differ():
    model = nn.ModuleDict({str(i): build() for i, build in enumerate(LEFT.values())})
    reports = []
    rnnfast.accelerate(model, report=reports.append)
    reasons = [reason for *_, reason in reports[0].entries]
    assert len(reasons) == len(LEFT)
    assert len(set(reasons[:2])) == 2


def test_report_goes_to_print(capsys):
    rnnfast.accelerate(nn.Sequential(nn.LSTM(3, 4)))
    out = capsys.readouterr().out
    assert "LSTM" in out
    rnnfast.accelerate(nn.Sequential(nn.LSTM(3, 4)), report=None)
    assert capsys.readouterr().out == ""
    rnnfast.accelerate(nn.Linear(3, 4))  # nothing to do is said too
    assert capsys.readouterr().out.strip()


def test_hooks_names_and_attributes_stay():
    model, seen = Tagger(), []
    lstm = model.rnns["lstm"]
    lstm.note = "mine"
    lstm.register_forward_hook(lambda m, args, out: seen.append("forward"))
    lstm.register_forward_pre_hook(lambda m, args: seen.append("pre"))
    lstm.weight_hh_l0.register_hook(lambda g: seen.append("gradient"))
    lstm.register_buffer("counter", torch.zeros(1))
    model.eval()
    names = [name for name, _ in model.named_modules()]
    quietly(model)
    assert [name for name, _ in model.named_modules()] == names
    assert model.rnns["lstm"] is lstm
    assert lstm.note == "mine"
    assert not lstm.training
    assert "counter" in lstm.state_dict()
    model(torch.randint(11, (6, 4))).sum().backward()
    assert seen == ["pre", "forward", "gradient"]


def test_shared_modules_and_shared_weights():
    """One module under two names stays one; a weight tied between two modules stays tied."""
    rnn = nn.GRU(5, 5)
    other = nn.GRU(5, 5)
    other.weight_hh_l0 = rnn.weight_hh_l0
    model = nn.ModuleDict({"a": rnn, "b": rnn, "c": other})
    want = model["c"](model["b"](model["a"](torch.ones(3, 2, 5))[0])[0])[0]
    quietly(model)
    assert model["a"] is model["b"] is rnn
    assert type(rnn) is type(other) is rnnfast.GRU
    assert other.weight_hh_l0 is rnn.weight_hh_l0
    got = model["c"](model["b"](model["a"](torch.ones(3, 2, 5))[0])[0])[0]
    torch.testing.assert_close(got, want)
    with torch.no_grad():
        rnn.weight_hh_l0.mul_(2)
    torch.testing.assert_close(
        other(torch.ones(3, 2, 5))[0], rnnfast.restore(other)(torch.ones(3, 2, 5))[0]
    )


def test_frozen_weights_stay_frozen():
    model = nn.GRU(5, 7)
    model.weight_ih_l0.requires_grad_(False)
    quietly(model)
    model(torch.randn(4, 3, 5))[0].sum().backward()
    assert model.weight_ih_l0.grad is None
    assert model.weight_hh_l0.grad is not None


def test_twice_and_back():
    model = Tagger()
    parameters = dict(model.named_parameters())
    text = repr(model)
    quietly(quietly(model))
    assert rnnfast.restore(model) is model
    modules = dict(model.named_modules())
    for name, kind in NAMES.items():
        assert type(modules[name]) is getattr(nn, kind)
        assert "reset_after" not in vars(modules[name])
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert repr(model) == text
    model(torch.randint(11, (6, 4)))
    rnnfast.restore(nn.Linear(3, 4))


def test_restore_leaves_what_torch_cannot_compute():
    """The original GRU has no class in torch.nn: as nn.GRU it would compute something else."""
    model = rnnfast.GRU(5, 7, reset_after=False)
    x = torch.randn(4, 3, 5)
    want = model(x)[0]
    try:
        rnnfast.restore(model)
    except ValueError as error:
        assert "reset_after" in str(error)  # noqa: PT017 - refusing is as good as leaving it
    assert torch.equal(model(x)[0], want)


def test_restore_refuses_a_forward_that_calls_rnnfasts():
    model = quietly(nn.Sequential(nn.GRU(5, 7), nn.LSTM(7, 7)))
    forward = model[1].forward
    model[1].forward = lambda *arguments: forward(*arguments)
    with pytest.raises(ValueError, match="the forward of 1 was replaced on the instance"):
        rnnfast.restore(model)
    assert type(model[0]) is rnnfast.GRU
    del model[1].forward
    assert type(rnnfast.restore(model)[1]) is nn.LSTM


def test_restore_refuses_a_parametrized_module():
    model = quietly(nn.Sequential(nn.GRU(5, 7), nn.LSTM(7, 7)))
    with_weight_norm(model[1])
    with pytest.raises(ValueError, match=r"1 is a .*LSTM, parametrized since"):
        rnnfast.restore(model)
    assert type(model[0]) is rnnfast.GRU
    nn.utils.parametrize.remove_parametrizations(model[1], "weight_hh_l0")
    assert type(rnnfast.restore(model)[1]) is nn.LSTM


def test_restore_leaves_subclasses():
    class Mine(rnnfast.LSTM):
        pass

    model = rnnfast.restore(nn.Sequential(Mine(5, 7), rnnfast.GRU(7, 7)))
    assert [type(module) for module in model] == [Mine, nn.GRU]


@pytest.mark.parametrize("kind", RECURRENT)
def test_an_accelerated_model_copies_and_saves(kind, tmp_path):
    model = quietly(nn.Sequential(getattr(nn, kind)(5, 7)))
    torch.save(model, tmp_path / "model.pt")
    for twin in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert type(twin[0]) is getattr(rnnfast, kind)
        x = torch.randn(3, 5) if kind.endswith("Cell") else torch.randn(4, 3, 5)
        (got, want) = (m(x)[0] for m in (twin, model))
        assert torch.equal(got, want)
