"""torch.onnx.export gives ONNX's own nodes, and ONNX Runtime the same answers."""

from __future__ import annotations

import io
import logging

import onnx
import onnxruntime
import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import rnnfast
from reference import CELLS
from twins import LAYERS, OF_EACH_CLASS, flatten, make, states

pytestmark = [
    # Of torch's own exporters, about themselves.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::torch.jit.TracerWarning"),
]
every_cell = pytest.mark.parametrize("cell", OF_EACH_CLASS)

OPTIONS = {
    "layer": {},
    "stack": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "no bias": {"bias": False},
    "Cell": {},
}


class Net(torch.nn.Module):
    """The module between others, as it is in a program, with or without states from outside."""

    def __init__(self, rnn):
        super().__init__()
        self.embed, self.rnn = torch.nn.Linear(4, 5), rnn

    def forward(self, x, h=None, c=None):
        return self.rnn(self.embed(x), h if c is None else (h, c))


@pytest.fixture(autouse=True)
def quiet():
    """The exporter logs what of torchvision it lacks."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def arguments(cell, kind, hx, steps, batch):
    if kind == "Cell":
        x, lead = torch.randn(batch, 4), ()
    elif kind == "stack":
        x, lead = torch.randn(batch, steps, 4), (4,)
    else:
        x, lead = torch.randn(steps, batch, 4), (1,)
    return (x, *(flatten(states(cell, *lead, batch, 7)) if hx else ()))


def dynamic(cell, kind, hx):
    T, B = torch.export.Dim("T"), torch.export.Dim("B")
    x = {"Cell": {0: B}, "stack": {0: B, 1: T}}.get(kind, {0: T, 1: B})
    state = {0: B} if kind == "Cell" else {1: B}
    return (x, *(state,) * ((2 if CELLS[cell].has_c else 1) if hx else 0))


def answers(model, args):
    session = onnxruntime.InferenceSession(model.SerializeToString())
    given = {i.name: a.numpy() for i, a in zip(session.get_inputs(), args, strict=True)}
    return [torch.from_numpy(a) for a in session.run(None, given)]


@every_cell
@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("hx", [False, True], ids=["", "hx"])
def test_nodes_and_answers(cell, kind, hx):
    suffix = "Cell" if kind == "Cell" else ""
    net = Net(make(rnnfast, cell, 5, 7, suffix=suffix, **OPTIONS[kind])).eval()
    exported = torch.onnx.export(
        net,
        arguments(cell, kind, hx, 4, 3),
        dynamo=True,
        dynamic_shapes=dynamic(cell, kind, hx),
        verbose=False,
    )
    assert exported is not None
    nodes = [n for n in exported.model_proto.graph.node if n.op_type in ("LSTM", "GRU", "RNN")]
    assert [n.op_type for n in nodes] == [CELLS[cell].layer] * (2 if kind == "stack" else 1)
    if CELLS[cell].layer == "GRU":
        flags = [a.i for n in nodes for a in n.attribute if a.name == "linear_before_reset"]
        assert flags == [int(cell == "gru")] * len(nodes)
    for steps, batch in ((4, 3), (7, 2), (1, 1)):
        args = arguments(cell, kind, hx, steps, batch)
        got, want = answers(exported.model_proto, args), flatten(net(*args))
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


class Padded(torch.nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x, lengths):
        return self.rnn(x, lengths=lengths)


@every_cell
@pytest.mark.parametrize("kind", ["layer", "stack"])
def test_lengths(cell, kind):
    """ONNX's sequence_lens, of any batch and length; rows of length 0 as well."""
    net = Padded(make(rnnfast, cell, 5, 7, **OPTIONS[kind])).eval()
    first = net.rnn.batch_first
    T, B = torch.export.Dim("T"), torch.export.Dim("B")
    sizes = ({0: B, 1: T} if first else {0: T, 1: B}, {0: B})

    def padded(lengths, steps):
        x = torch.randn(*((len(lengths), steps) if first else (steps, len(lengths))), 5)
        return x, torch.tensor(lengths)

    exported = torch.onnx.export(
        net, padded([4, 1, 3], 4), dynamo=True, dynamic_shapes=sizes, verbose=False
    )
    assert exported is not None
    for lengths, steps in (([4, 1, 3], 4), ([2, 7], 9), ([1], 1), ([5, 5, 5, 5], 5), ([0, 3, 0], 4)):
        args = padded(lengths, steps)
        got, want = answers(exported.model_proto, args), flatten(net(*args))
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


class Chunks(torch.nn.Module):
    """A stream in chunks: the states of the last chunk are those of the next."""

    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x, lengths, h0, c0=None):
        return self.rnn(x, h0 if c0 is None else (h0, c0), lengths=lengths)


@every_cell
def test_lengths_and_states(cell):
    """A row of length 0 keeps its states. ONNX's nodes return zeros for it."""
    net = Chunks(make(rnnfast, cell, 5, 7, 2, bidirectional=True)).eval()
    states = [torch.randn(4, 3, 7) for _ in range(2 if CELLS[cell].has_c else 1)]
    args = torch.randn(4, 3, 5), torch.tensor([2, 0, 4]), *states
    exported = torch.onnx.export(net, args, dynamo=True, verbose=False)
    assert exported is not None
    got, want = answers(exported.model_proto, args), flatten(net(*args))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)
    for a, state in zip(got[1:], states, strict=True):
        torch.testing.assert_close(a[:, 1], state[:, 1])


def test_unbatched_and_by_hand():
    net = Net(make(rnnfast, "gru", 5, 7)).eval()
    x = torch.randn(6, 4)
    exported = torch.onnx.export(
        net, (x,), dynamo=True, custom_translation_table=rnnfast.onnx.translations(), verbose=False
    )
    for got, want in zip(answers(exported.model_proto, (x,)), net(x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6)


def all_words(error: BaseException | None) -> str:
    """Of an error and its causes."""
    said = []
    while error is not None:
        said.append(str(error))
        error = error.__cause__
    return "".join(said)


@pytest.mark.parametrize(
    ("options", "what", "extra"),
    [
        ({"proj_size": 3}, "proj_size", {}),
        ({}, "reset=", {"reset": torch.zeros(4, 3, dtype=torch.bool)}),
        ({}, "return_cell_states=", {"return_cell_states": True}),
        ({}, "packed sequences", {"input": pack_padded_sequence(torch.randn(4, 3, 5), [4, 2, 1])}),
    ],
    ids=["proj_size", "reset", "return_cell_states", "packed"],
)
def test_what_onnx_lacks_is_said(options, what, extra):
    """torch.nn's own projected LSTM exports without a word, and the file computes something else."""
    module = make(rnnfast, "lstm", 5, 7, **options)
    given = {"input": torch.randn(4, 3, 5), **extra}
    with pytest.raises(torch.onnx.OnnxExporterError) as caught:
        torch.onnx.export(module, kwargs=given, dynamo=True, verbose=False)
    assert f"ONNX's LSTM has no counterpart of {what}" in all_words(caught.value)


@every_cell
def test_bfloat16_is_refused(cell):
    """torch.nn's own export without a word, and the file is not valid."""
    module, x = make(rnnfast, cell, 5, 7, dtype=torch.bfloat16), torch.randn(4, 3, 5).bfloat16()
    with pytest.raises(torch.onnx.OnnxExporterError) as caught:
        torch.onnx.export(module, (x,), dynamo=True, verbose=False)
    assert f"ONNX's {CELLS[cell].layer} has no counterpart of bfloat16" in all_words(caught.value)


@pytest.mark.parametrize("cell", LAYERS)
def test_older_exporter(cell):
    """By tracing: what torch.nn's modules give there."""
    module, x, file = make(rnnfast, cell, 5, 7).eval(), torch.randn(4, 3, 5), io.BytesIO()
    torch.onnx.export(module, (x,), file, dynamo=False)
    model = onnx.load_from_string(file.getvalue())
    assert CELLS[cell].layer in [n.op_type for n in model.graph.node]
    for got, want in zip(answers(model, (x,)), flatten(module(x)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6)
