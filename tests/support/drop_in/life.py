"""Life cycle."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings

import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence, unpack_sequence, unpad_sequence

import rnnfast
from twins import flatten

from .items import (
    LAYERS,
    Net,
    build,
    close,
    example,
    first,
    item,
)

LIFE = "Life cycle"


@item(LIFE, "`copy.deepcopy`, `pickle`, `torch.save` of the module")
def copies(package, kind):
    module, x, file = build(package, kind), example(kind), io.BytesIO()
    module(x)
    torch.save(module, file)
    file.seek(0)
    for other in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(file, weights_only=False),
    ):
        assert type(other) is type(module)
        close(other(x), module(x), 0, 0)


@item(LIFE, "`state_dict` both ways, through `torch.load(weights_only=True)`")
def state_dicts(package, kind):
    x = example(kind)
    for give, take in ((package, nn), (nn, package)):
        source, target, file = build(give, kind), build(take, kind), io.BytesIO()
        for p in source.parameters():
            nn.init.normal_(p, std=0.3)
        torch.save(source.state_dict(), file)
        file.seek(0)
        target.load_state_dict(torch.load(file, weights_only=True), strict=True)
        close(target(x), source(x))


@item(LIFE, '`to("meta")`, `to_empty`, `load_state_dict`')
def from_meta(package, kind):
    module, x = build(package, kind), example(kind)
    other = build(package, kind, device="meta")
    assert first(other(x.to("meta"))).is_meta
    other = other.to_empty(device="cpu")
    other.load_state_dict(module.state_dict())
    close(other(x), module(x), 0, 0)


@item(LIFE, "`load_state_dict(assign=True)`")
def assigned(package, kind):
    module, x = build(package, kind), example(kind)
    other = build(package, kind, device="meta")
    other.load_state_dict(module.state_dict(), assign=True)
    close(other(x), module(x), 0, 0)
    with torch.no_grad():
        next(module.parameters()).add_(1)  # one memory
    close(other(x), module(x), 0, 0)


@item(LIFE, "`torch.nn.utils.skip_init`")
def skips_init(package, kind):
    module = nn.utils.skip_init(getattr(package, kind), 5, 7)
    other, x = build(package, kind), example(kind)
    module.load_state_dict(other.state_dict())
    close(module(x), other(x), 0, 0)


@item(LIFE, "packed sequences by `torch.nn.utils.rnn`'s helpers", LAYERS)
def packed(package, kind):
    module, rows = build(package, kind), [torch.randn(n, 5) for n in (2, 4, 1)]
    y, state = module(pack_sequence(rows, enforce_sorted=False))
    padded, lengths = pad_packed_sequence(y)
    for got, again, row in zip(unpack_sequence(y), unpad_sequence(padded, lengths), rows, strict=True):
        close(got, first(module(row)))
        close(again, got, 0, 0)
    close(first(state)[0, 1], first(module(rows[1]))[-1])


@item(LIFE, "`flatten_parameters`, `reset_parameters`, `all_weights`", LAYERS)
def torchs_methods(package, kind):
    module, x = build(package, kind), example(kind)
    want = flatten(module(x))
    module.flatten_parameters()
    close(module(x), want, 0, 0)
    assert [[id(w) for w in module.parameters()]] == [[id(w) for w in ws] for ws in module.all_weights]
    torch.manual_seed(0)
    module.reset_parameters()
    close(module(x), want, 0, 0)


@item(LIFE, "`repr`, `isinstance` of torch.nn's class, `model.apply`")
def looks_like(package, kind):
    module, theirs, seen = build(package, kind), build(nn, kind), []
    assert repr(module) == repr(theirs)
    assert isinstance(module, getattr(nn, kind))
    nn.Sequential(module).apply(lambda m: seen.append(m) if isinstance(m, type(theirs)) else None)
    assert seen == [module]
    sig = list(inspect.signature(module.forward).parameters)
    assert sig[:2] == ["input", "hx"]


@item(LIFE, "memory that other processes can share (`share_memory`)")
def shared(package, kind):
    module, x = build(package, kind), example(kind)
    want = flatten(module(x))
    module.share_memory()
    assert all(p.is_shared() for p in module.parameters())
    close(module(x), want, 0, 0)


@item(
    LIFE,
    "`rnnfast.accelerate` and `restore`, and back",
    note="the torch.nn column begins with its modules",
)
def there_and_back(package, kind):
    model, x = nn.Sequential(build(package, kind)), example(kind)
    want, weights = flatten(model(x)), [id(p) for p in model.parameters()]
    for swap, own in ((rnnfast.accelerate, rnnfast), (rnnfast.restore, nn)) * 2:
        swap(model, **({"report": None} if swap is rnnfast.accelerate else {}))
        assert type(model[0]) is getattr(own, kind)
        assert [id(p) for p in model.parameters()] == weights
        close(model(x), want)


@item(
    LIFE,
    "`quantize_dynamic`: quantized or left, never wrong",
    note="left: `quantize_dynamic` knows only torch.nn's exact classes; "
    "it quantizes after `rnnfast.restore(model)`",
)
def quantized(package, kind):
    net, x = nn.Sequential(build(package, kind)), example(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kinds in ({getattr(package, kind)}, {getattr(nn, kind)}):
            other = torch.ao.quantization.quantize_dynamic(net, kinds, torch.qint8)
            close(other(x), net(x), 0.1, 0.1)
        other = torch.ao.quantization.quantize_dynamic(
            rnnfast.restore(copy.deepcopy(net)), {getattr(nn, kind)}, torch.qint8
        )
    close(other(x), net(x), 0.1, 0.1)
    assert "quantized" in type(other[0]).__module__ or kind == "RNN"  # which torch leaves too


@item(LIFE, "`torch.fx.symbolic_trace` of a model: one node")
def fx_traces(package, kind):
    net, x = Net(build(package, kind)), example(kind)
    net.rnn.register_forward_pre_hook(lambda m, args: (2 * args[0],))
    traced = torch.fx.symbolic_trace(net)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["rnn"]
    close(traced(x), net(x))
