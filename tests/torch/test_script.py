"""torch.jit: traced and scripted programs, saved and loaded."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import rnnfast
from reference import CELLS
from twins import LAYERS, flatten, make, states

pytestmark = pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::UserWarning"
)
every_layer = pytest.mark.parametrize("cell", LAYERS)
every_suffix = pytest.mark.parametrize("suffix", ["", "Cell"], ids=["layer", "cell"])


class Net(torch.nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x):
        return self.rnn(x)


class PackedNet(torch.nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x: PackedSequence):
        return self.rnn(x)


def saved_and_loaded(program):
    file = io.BytesIO()
    torch.jit.save(program, file)
    file.seek(0)
    return torch.jit.load(file)


def close(got, want):
    for a, b in zip(flatten(got), flatten(want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


@every_layer
@every_suffix
@pytest.mark.parametrize("how", ["script", "trace"])
def test_saved_and_loaded(cell, suffix, how):
    net = Net(make(rnnfast, cell, 5, 17, suffix=suffix))
    kind, lead = type(net.rnn), () if suffix else (4,)
    x = torch.randn(*lead, 3, 5)
    program = torch.jit.trace(net, x) if how == "trace" else torch.jit.script(net)
    assert type(net.rnn) is kind  # the model is as it was
    for other in (program, saved_and_loaded(program)):
        close(other(x), net(x))
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.5)
    close(program(x), net(x))  # the weights are the model's


@every_layer
def test_scripted_stacks_and_packed_sequences(cell):
    net = PackedNet(make(rnnfast, cell, 5, 17, num_layers=2, bidirectional=True, dropout=0.5)).eval()
    x = pack_sequence([torch.randn(n, 5) for n in (2, 4, 1)], enforce_sorted=False)
    got, want = saved_and_loaded(torch.jit.script(net))(x), net(x)
    assert torch.equal(got[0].batch_sizes, want[0].batch_sizes)
    close((got[0].data, got[1]), (want[0].data, want[1]))


def test_scripted_training():
    net, x = Net(make(rnnfast, "lstm", 5, 17)), torch.randn(4, 3, 5)
    leaves = list(net.parameters())
    got, want = (
        torch.autograd.grad(f(x)[0].square().sum(), leaves) for f in (torch.jit.script(net), net)
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=5e-6)


@every_suffix
def test_original_gru(suffix):
    """Torch has no operator for it. A failure leaves the model as it was."""
    lead = () if suffix else (4,)
    net = torch.nn.Sequential(make(rnnfast, "gru", 5, 5, suffix=suffix), torch.nn.ReLU())
    original = Net(make(rnnfast, "gru_original", 5, 17, suffix=suffix))
    whole = torch.nn.ModuleList([net, original])
    with pytest.raises(RuntimeError, match="reset_after=False"):
        torch.jit.script(whole)
    assert type(net[0]) is getattr(rnnfast, "GRU" + suffix)
    x = torch.randn(*lead, 3, 5)
    close(saved_and_loaded(torch.jit.trace(original, x))(x), original(x))


def test_what_does_not_compile_leaves_the_model_as_it_was():
    class Wrong(Net):
        def forward(self, x):
            return self.rnn(x, *[None], **{})

    net = Wrong(make(rnnfast, "gru", 5, 17))
    with pytest.raises(torch.jit.frontend.NotSupportedError):
        torch.jit.script(net)
    assert type(net.rnn) is rnnfast.GRU


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_runs_without_rnnfast(cell, tmp_path):
    net, x = Net(make(rnnfast, cell, 5, 17)), torch.randn(4, 3, 5)
    path = tmp_path / "program.pt"
    torch.jit.save(torch.jit.script(net), path)
    torch.save({"x": x, "y": net(x)[0].detach()}, tmp_path / "case.pt")
    code = (
        "import sys, torch; sys.modules['rnnfast'] = None; "
        "case = torch.load('case.pt'); y = torch.jit.load('program.pt')(case['x'])[0]; "
        "torch.testing.assert_close(y, case['y'], rtol=1e-5, atol=2e-6)"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, check=True, timeout=120)


@every_layer
@pytest.mark.parametrize("hx", [False, True], ids=["", "hx"])
def test_lengths_that_were_not_traced(cell, hx):
    """A trace of rows that all have steps is right for rows of length 0."""
    module, x = make(rnnfast, cell, 5, 17, bidirectional=True), torch.randn(4, 3, 5)
    given = states(cell, 2, 3, 17) if hx else None

    class Padded(Net):
        def forward(self, x, lengths):
            return self.rnn(x, given, lengths=lengths)

    net = Padded(module)
    program = torch.jit.trace(net, (x, torch.tensor([4, 2, 1])))
    for lengths in ([4, 0, 1], [0, 0, 4], [3, 4, 4]):
        close(program(x, torch.tensor(lengths)), net(x, torch.tensor(lengths)))


def test_torchs_own_modules_script_as_ever():
    name = CELLS["gru"].layer
    net, x = Net(getattr(torch.nn, name)(5, 17)), torch.randn(4, 3, 5)
    close(torch.jit.script(net)(x), net(x))
