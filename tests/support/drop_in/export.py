"""Compile and export."""

from __future__ import annotations

import io

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from twins import flatten

from .items import (
    LAYERS,
    Net,
    build,
    close,
    compiled,
    example,
    gradients,
    item,
)

COMPILE = "Compile and export"


@item(
    COMPILE,
    "`torch.compile(fullgraph=True)`, training",
    note="rnnfast ignores `torch._dynamo.config.allow_rnn`; torch.nn's classes still obey it",
)
def compiles_training(package, kind):
    module, x = build(package, kind), example(kind)
    close(gradients(compiled(module), x), gradients(module, x))


@item(COMPILE, "`torch.compile(fullgraph=True)`, inference")
def compiles_inference(package, kind):
    module, x = build(package, kind), example(kind)
    with torch.no_grad():
        close(compiled(module)(x), module(x))


@item(COMPILE, "... any batch and length in two compilations")
def compiles_once(package, kind):
    from torch._dynamo.testing import CompileCounterWithBackend

    module, counter = build(package, kind), CompileCounterWithBackend("aot_eager")
    run = compiled(module, counter)
    for steps, batch in ((4, 3), (6, 2), (9, 5), (17, 33), (5, 8)):
        x = example(kind, steps, batch)
        close(run(x), module(x))
    assert counter.frame_count <= 2, f"{counter.frame_count} compilations"


def batches_of_rows():
    for lengths in ([2, 4, 1], [3, 3], [9, 1, 2, 5], [6, 7], [1, 1, 8, 2, 2]):
        yield [torch.randn(length, 5) for length in lengths]


@item(
    COMPILE,
    "... packed sequences, any batch and lengths in two compilations, training",
    LAYERS,
    "the batch is packed outside of the graph; `lengths=` needs no packing",
)
def compiles_packed(package, kind):
    from torch._dynamo.testing import CompileCounterWithBackend

    module, counter = build(package, kind), CompileCounterWithBackend("aot_eager")
    run = compiled(module, counter)
    for rows in batches_of_rows():
        x = pack_sequence(rows, enforce_sorted=False)
        results = []
        for call in (run, module):
            y, state = call(x)
            out = (y.data, *flatten(state))
            loss = sum(o.square().sum() for o in out)
            results.append((*out, *torch.autograd.grad(loss, list(module.parameters()))))
        close(*results)
    assert counter.frame_count <= 2, f"{counter.frame_count} compilations"


def dynamic(kind):
    T, B = torch.export.Dim("T"), torch.export.Dim("B")
    return ({0: B},) if kind.endswith("Cell") else ({0: T, 1: B},)


@item(COMPILE, "`torch.export`, fixed sizes")
def exports(package, kind):
    module, x = build(package, kind), example(kind)
    close(torch.export.export(module, (example(kind),)).module()(x), module(x))


@item(COMPILE, "`torch.export`, any batch and length, saved and loaded")
def exports_any_size(package, kind):
    module, file = build(package, kind), io.BytesIO()
    program = torch.export.export(module, (example(kind),), dynamic_shapes=dynamic(kind))
    torch.export.save(program, file)
    file.seek(0)
    program = torch.export.load(file).module()
    for steps, batch in ((4, 3), (6, 2)):
        x = example(kind, steps, batch)
        close(program(x), module(x))


class FromFields(nn.Module):
    """Torch exports a PackedSequence with fixed sizes only, and does not save it."""

    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, data, batch_sizes, sorted_indices, unsorted_indices):
        y, state = self.rnn(PackedSequence(data, batch_sizes, sorted_indices, unsorted_indices))
        return y.data, state


@item(
    COMPILE,
    "... packed sequences, any batch and lengths, saved and loaded",
    LAYERS,
    "the program has the four tensors of a PackedSequence for inputs",
)
def exports_packed(package, kind):
    net, file = FromFields(build(package, kind)), io.BytesIO()
    rows, steps, batch = (torch.export.Dim(name) for name in ("rows", "steps", "batch"))
    shapes = ({0: rows}, {0: steps}, {0: batch}, {0: batch})
    first, *others = (tuple(pack_sequence(rows, enforce_sorted=False)) for rows in batches_of_rows())
    torch.export.save(torch.export.export(net, first, dynamic_shapes=shapes), file)
    file.seek(0)
    program = torch.export.load(file).module()
    for fields in (first, *others):
        close(program(*fields), net(*fields))


@item(COMPILE, "AOTInductor: packaged and loaded, any batch and length", ("LSTM",), "an LSTM")
def ahead_of_time(package, kind):
    module = build(package, kind).eval()
    with torch.no_grad():
        program = torch.export.export(module, (example(kind),), dynamic_shapes=dynamic(kind))
        loaded = torch._inductor.aoti_load_package(torch._inductor.aoti_compile_and_package(program))
        for steps, batch in ((4, 3), (6, 2)):
            x = example(kind, steps, batch)
            close(loaded(x), module(x))


def onnx_session(module, kind, **options):
    import onnxruntime

    exported = torch.onnx.export(module, (example(kind),), dynamo=True, verbose=False, **options)
    session = onnxruntime.InferenceSession(exported.model_proto.SerializeToString())
    name = session.get_inputs()[0].name
    nodes = [n.op_type for n in exported.model_proto.graph.node]
    return nodes, lambda x: [torch.from_numpy(a) for a in session.run(None, {name: x.numpy()})]


@item(COMPILE, "`torch.onnx.export(dynamo=True)`: ONNX's own node, any batch and length")
def onnx_nodes(package, kind):
    module = build(package, kind).eval()
    nodes, run = onnx_session(module, kind, dynamic_shapes=dynamic(kind))
    assert kind.removesuffix("Cell") in nodes, f"no {kind} node"
    for steps, batch in ((4, 3), (6, 2)):
        x = example(kind, steps, batch)
        close(tuple(run(x)), module(x))


@item(COMPILE, "... of a projected LSTM: right, or refused", ("LSTM",), "refused: ONNX has none")
def onnx_projected(package, kind):
    module, x = build(package, kind, 5, 7, proj_size=3).eval(), example(kind)
    try:
        _, run = onnx_session(module, kind)
    except torch.onnx.OnnxExporterError:
        return
    assert [o.shape for o in run(x)] == [o.shape for o in flatten(module(x))], "a wrong file"


def through_jit(program):
    file = io.BytesIO()
    torch.jit.save(program, file)
    file.seek(0)
    return torch.jit.load(file)


AT_TORCHS_SPEED = "the program holds torch's operators: it needs no rnnfast, and has torch's speed"


@item(COMPILE, "`torch.jit.trace`, saved and loaded", note=AT_TORCHS_SPEED)
def traces(package, kind):
    net, x = Net(build(package, kind)), example(kind)
    close(through_jit(torch.jit.trace(net, example(kind)))(x), net(x))


@item(COMPILE, "`torch.jit.script` of a model, saved and loaded", note=AT_TORCHS_SPEED)
def scripts(package, kind):
    net, x = Net(build(package, kind)), example(kind)
    close(through_jit(torch.jit.script(net))(x), net(x))
    assert type(net.rnn) is getattr(package, kind)
