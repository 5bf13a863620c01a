"""gradient_flow against autograd on a loop over single steps in float64."""

from __future__ import annotations

import gc

import matplotlib as mpl
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import rnnfast
from cell_modules import CELLS, every_cell
from rnnfast.stack import flow as recorders
from rnnfast.stack.formulas import FORMULAS
from threads import set_threads


def module_of(cell, inputs=4, hidden=21, **options):
    make, cell_options = CELLS[cell]
    return make(inputs, hidden, **{"dtype": torch.float64} | cell_options | options)


def run_steps(module, x, loss_of, lengths, reset):
    """The norms by autograd through a loop over the rows and steps, with the formula of the cell."""
    steps, batch, _ = x.shape
    lengths = lengths or [steps] * batch
    directions = 2 if module.bidirectional else 1
    width, has_c = module.proj_size or module.hidden_size, isinstance(module, nn.LSTM)
    states = {}  # (layer, direction, step): h and c of every row
    for layer in range(module.num_layers):
        outputs = torch.zeros(steps, batch, directions * width, dtype=x.dtype)
        for direction in range(directions):
            suffix = f"_l{layer}{'_reverse' if direction else ''}"
            weight = {
                name.removesuffix(suffix): w
                for name, w in module.named_parameters()
                if name.endswith(suffix)
            }
            for b, length in enumerate(lengths):
                h, c = x.new_zeros(1, width), x.new_zeros(1, module.hidden_size)
                for t in reversed(range(length)) if direction else range(length):
                    if reset is not None and reset[t, b]:
                        h, c = torch.zeros_like(h), torch.zeros_like(c)
                    a = x[t, b : b + 1] @ weight["weight_ih"].T + weight["bias_ih"]
                    h, c = FORMULAS[module._cell()](a, h, c, weight["weight_hh"], weight["bias_hh"])
                    if "weight_hr" in weight:
                        h = h @ weight["weight_hr"].T
                    kept = [h, c] if has_c else [h]
                    for state in kept:
                        state.retain_grad()
                    states.setdefault((layer, direction, t), []).append(kept)
                    columns = slice(direction * width, (direction + 1) * width)
                    outputs = outputs.clone()
                    outputs[t, b, columns] = h[0]
                    c = c if has_c else x.new_zeros(1, module.hidden_size)
        x = outputs
    loss_of(x).backward()
    norms = [torch.zeros(module.num_layers, directions, steps, dtype=x.dtype) for _ in range(2)]
    for place, rows in states.items():
        for k in range(1 + has_c):
            norms[k][place] = sum(kept[k].grad.square().sum() for kept in rows).sqrt()
    return norms[0], norms[1] if has_c else None


def compare(module, steps=9, batch=3, lengths=None, reset=None):
    width = (module.proj_size or module.hidden_size) * (2 if module.bidirectional else 1)
    x = torch.randn(steps, batch, module.input_size, dtype=torch.float64)
    dy = torch.randn(steps, batch, width, dtype=torch.float64)

    def loss_of(y):
        return (y * dy).sum() + (y[-1] ** 2).sum()

    expected = run_steps(module, x, loss_of, lengths, reset)
    y, _ = module(x, lengths=lengths, reset=reset)
    loss = loss_of(y)
    with rnnfast.gradient_flow(module) as flow:
        loss.backward()
    (record,) = flow.records
    torch.testing.assert_close(record.h, expected[0])
    if expected[1] is None:
        assert record.c is None
    else:
        torch.testing.assert_close(record.c, expected[1])
    return flow


@pytest.mark.numerics(dtype="float64")
@every_cell
def test_norms(cell):
    compare(module_of(cell))


@every_cell
def test_layers_and_directions(cell):
    compare(module_of(cell, num_layers=2, bidirectional=True))


@every_cell
def test_rows_of_different_lengths(cell):
    compare(module_of(cell, bidirectional=True), lengths=[4, 9, 1])


@every_cell
def test_resets(cell):
    compare(module_of(cell, bidirectional=True), reset=torch.rand(9, 3) < 0.3)


@every_cell
def test_batch_first(cell):
    module = module_of(cell, num_layers=2, bidirectional=True)
    twin = module_of(cell, num_layers=2, bidirectional=True, batch_first=True)
    twin.load_state_dict(module.state_dict())
    x, records = torch.randn(9, 3, 4, dtype=torch.float64), []
    for one, given in ((module, x), (twin, x.transpose(0, 1))):
        with rnnfast.gradient_flow(one) as flow:
            one(given)[0].square().sum().backward()
        records += flow.records
    torch.testing.assert_close(records[0].h, records[1].h)
    torch.testing.assert_close(records[0].c, records[1].c) if records[0].c is not None else None


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("batch", [1, 40])
@every_cell
def test_threads_do_not_matter(cell, batch, threads):
    # 40 rows of 20 steps run in two groups of rows.
    module = module_of(cell, hidden=40, num_layers=2, dtype=torch.float32)
    x = torch.randn(20, batch, 4)
    y, _ = module(x)

    def record():
        with rnnfast.gradient_flow(module) as flow:
            y.square().sum().backward(retain_graph=True)
        return flow.records[0]

    one = record()
    set_threads(threads)
    several = record()
    assert one.h.equal(several.h)
    assert one.c is None or one.c.equal(several.c)


@pytest.mark.numerics(dtype="float32")
@pytest.mark.parametrize("size", [1e-30, 3e-16, 1e-15, 1e18, 1e25])
def test_squares_neither_vanish_nor_overflow(size):
    module, x = module_of("rnn_tanh", dtype=torch.float32), torch.randn(3, 2, 4)
    norms = []
    for factor in (1.0, size):
        loss = factor * module(x)[0][-1].sum()
        with rnnfast.gradient_flow(module) as flow:
            loss.backward()
        norms.append(flow.records[0].h)
    torch.testing.assert_close(norms[1] / size, norms[0], rtol=1e-4, atol=0)


def test_packed_and_padded_are_the_same():
    module = module_of("lstm", bidirectional=True)
    x, lengths = torch.randn(7, 4, 4, dtype=torch.float64), [3, 7, 1, 7]
    records = []
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
    outputs = [module(x, lengths=lengths)[0], module(packed)[0].data]
    for y in outputs:
        with rnnfast.gradient_flow(module) as flow:
            y.square().sum().backward()
        records.append(flow.records[0])
    torch.testing.assert_close(records[0].h, records[1].h)
    torch.testing.assert_close(records[0].c, records[1].c)


def test_gradients_stay_the_same():
    module, x = module_of("lstm", num_layers=2, dtype=torch.float32), torch.randn(30, 20, 4)
    y, _ = module(x)
    y.sum().backward(retain_graph=True)
    expected = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    with rnnfast.gradient_flow(module):
        y.sum().backward()
    assert all(p.grad.equal(e) for p, e in zip(module.parameters(), expected, strict=True))
    assert not recorders.RECORDERS


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = rnnfast.GRU(4, 6, 2, dropout=0.3)
        self.decoder = rnnfast.LSTMCell(6, 5)

    def forward(self, x):
        y, _ = self.encoder(x)
        state, outputs = None, []
        for step in y:
            state = self.decoder(step, state)
            outputs.append(state[0])
        return torch.stack(outputs)


def test_a_model_of_layers_and_cells():
    model, other = Model(), rnnfast.RNN(4, 3)
    x = torch.randn(5, 2, 4)
    loss = model(x).sum() + other(x)[0].sum()
    with rnnfast.gradient_flow(model) as flow:
        loss.backward()
    names = [(record.module, record.first_layer) for record in flow.records]
    assert names == [("decoder", 0)] * 5 + [("encoder", 1), ("encoder", 0)]
    table = flow.table()
    assert len(table) == 5 + 2 * 5
    assert [row.call for row in table if row.module == "decoder"] == list(range(5))
    assert {row.layer for row in table if row.module == "encoder"} == {0, 1}
    assert all((row.c is None) == (row.module == "encoder") and row.h > 0 for row in table)


def test_contexts_in_one_another():
    module = module_of("lstm", num_layers=2, bidirectional=True)
    y, _ = module(torch.randn(3, 2, 4, dtype=torch.float64))
    with rnnfast.gradient_flow(module) as outer:
        with rnnfast.gradient_flow(module) as inner:
            y.sum().backward(retain_graph=True)
        y.sum().backward()
    assert (len(outer.records), len(inner.records)) == (2, 1)


def test_contexts_that_overlap():
    """As those of two threads do."""
    module = module_of("gru")
    y, _ = module(torch.randn(3, 2, 4, dtype=torch.float64))
    contexts = [rnnfast.gradient_flow(module) for _ in range(2)]
    flows = [context.__enter__() for context in contexts]
    for context in contexts:
        y.sum().backward(retain_graph=True)
        context.__exit__(None, None, None)
    assert [len(flow.records) for flow in flows] == [1, 2]


def test_the_table_has_all_norms():
    module = module_of("lstm", num_layers=2, bidirectional=True)
    (record,) = (flow := compare(module)).records
    rows = {(row.layer, row.direction, row.step): row for row in flow.table()}
    assert len(rows) == len(flow.table()) == record.h.numel()
    for place, row in rows.items():
        assert (row.h, row.c) == (record.h[place].item(), record.c[place].item())


def test_the_plot():
    mpl.use("agg")
    module = module_of("lstm", bidirectional=True)
    flow = compare(module)
    axes = flow.plot()
    assert [line.get_label() for line in axes.lines] == [
        "model, layer 0: h",
        "model, layer 0: c",
        "model, layer 0, reverse: h",
        "model, layer 0, reverse: c",
    ]
    assert axes.lines[0].get_ydata().tolist() == flow.records[0].h[0, 0].tolist()
    assert axes.get_yscale() == "log"
    mpl.pyplot.close("all")


def test_the_plot_of_a_cell_is_one_line():
    mpl.use("agg")
    model = Model()
    loss = model(torch.randn(5, 2, 4)).sum()
    with rnnfast.gradient_flow(model) as flow:
        loss.backward()
    lines = {line.get_label(): line.get_ydata() for line in flow.plot().lines}
    assert lines.keys() == {
        "decoder, layer 0: h",
        "decoder, layer 0: c",
        "encoder, layer 0: h",
        "encoder, layer 1: h",
    }
    steps = [record.h.item() for record in flow.records if record.module == "decoder"]
    assert lines["decoder, layer 0: h"].tolist() == steps[::-1]
    mpl.pyplot.close("all")


def test_the_plot_of_several_calls():
    module = module_of("gru", num_layers=2)
    inputs = [torch.randn(steps, 2, 4, dtype=torch.float64) for steps in (1, 5)]
    loss = sum(module(x)[0].sum() for x in inputs)
    with rnnfast.gradient_flow(module) as flow:
        loss.backward()
    axes = Figure().subplots()
    assert flow.plot(axes) is axes
    labels = [f"model, call {call}, layer {layer}: h" for call in (0, 1) for layer in (0, 1)]
    assert [line.get_label() for line in axes.lines] == labels
    for line, steps in zip(axes.lines, (5, 5, 1, 1), strict=True):  # backward begins with the last
        assert len(line.get_ydata()) == steps
        assert line.get_marker() == ("." if steps == 1 else "None")


@pytest.mark.parametrize(
    ("shared", "names"),
    [(["weight_hh_l0"], ["a", "b"]), (["weight_hh_l0", "weight_ih_l0"], ["a, b", "a, b"])],
)
def test_names_of_modules_that_share_weights(shared, names):
    model = nn.ModuleDict({"a": module_of("gru"), "b": module_of("gru", hidden=21)})
    for name in shared:
        setattr(model["b"], name, getattr(model["a"], name))
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    loss = model["a"](x)[0].sum() + model["b"](x)[0].sum()
    with rnnfast.gradient_flow(model) as flow:
        loss.backward()
    assert sorted(record.module for record in flow.records) == names


def test_layers_that_share_a_weight():
    """With dropout each layer is a call of its own."""
    module = rnnfast.LSTM(4, 4, 2, dropout=0.1)
    module.weight_hh_l1 = module.weight_hh_l0
    with rnnfast.gradient_flow(module) as flow:
        module(torch.randn(3, 2, 4))[0].sum().backward()
    assert [(record.module, record.first_layer) for record in flow.records] == [("", 1), ("", 0)]
    model = nn.ModuleDict({"a": module})
    module.weight_ih_l1 = module.weight_ih_l0
    with rnnfast.gradient_flow(model) as flow:
        module(torch.randn(3, 2, 4))[0].sum().backward()
    assert [(record.module, record.first_layer) for record in flow.records] == [("a", 0), ("a", 0)]


def test_no_other_module_gets_the_address_of_a_weight():
    model = nn.ModuleList([rnnfast.GRU(64, 64)])
    with rnnfast.gradient_flow(model) as flow:
        model[0](torch.randn(3, 2, 64))[0].sum().backward()
        kept = model[0].weight_hh_l0
        kept.data = torch.zeros(1)
        del model[0]
        gc.collect()
        for other in [rnnfast.GRU(64, 64) for _ in range(5)]:
            other(torch.randn(3, 2, 64))[0].sum().backward()
    assert len(flow.records) == 1


def test_nothing_recorded():
    module = nn.LSTM(3, 4)
    loss = module(torch.randn(2, 1, 3))[0].sum()
    with pytest.raises(RuntimeError, match="recorded nothing"), rnnfast.gradient_flow(module):
        loss.backward()
    with pytest.raises(KeyError), rnnfast.gradient_flow(module):  # the user's own error stays
        raise KeyError
    assert not recorders.RECORDERS
