"""What rnnfast is measured beside.

A peer is a function that prepares a case and returns a job; a job runs the case once and returns
what it computed. A new peer is one function and one row in PEERS; None from it means that it does not
do this case.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import rnnfast
from rnnfast.cli.bench.measure import TRAIN, Case, Job, Peer, Problem


def module_peer(package: ModuleType, context: Any = contextlib.nullcontext) -> Peer:
    """A peer whose package has classes like those of torch.nn, run in ``context(module)``."""

    def prepare(case: Case, given: Problem) -> Job:
        training = case.mode == TRAIN
        module: nn.Module = getattr(package, case.cell)(case.I, case.H, **given.options)
        module.load_state_dict(given.weights)
        module.train(training)
        x = given.x.clone().requires_grad_(training and case.dx)
        inputs = x if given.batch_sizes is None else PackedSequence(x, given.batch_sizes)
        hx: Any = given.states if len(given.states) == 2 else given.states[0]
        wanted = [x, *module.parameters()] if case.dx else list(module.parameters())

        held = contextlib.ExitStack()
        held.enter_context(context(module))

        def run(held: contextlib.ExitStack = held) -> Tensor:
            y, _ = module(inputs, hx)
            return y.data if isinstance(y, PackedSequence) else y

        def forward() -> Sequence[Tensor]:
            with torch.no_grad():
                return [run()]

        def train() -> Sequence[Tensor]:
            y = run()
            return [y.detach(), *torch.autograd.grad(y, wanted, given.dy)]

        return train if training else forward

    return prepare


def frozen_peer(case: Case, given: Problem) -> Job | None:
    """As in the context of rnnfast.frozen, for as long as the job lives."""
    return module_peer(rnnfast, rnnfast.frozen)(case, given)


def onnxruntime_peer(case: Case, given: Problem) -> Job | None:
    """ONNX's own recurrent operators, in ONNX Runtime."""
    if case.mode == TRAIN or case.packed or case.proj or case.dtype != "float32":
        return None
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        onnx_model(case, given), options, providers=["CPUExecutionProvider"]
    )
    feeds = {"x": given.x.numpy()}

    def run() -> Sequence[Tensor]:
        return [torch.from_numpy(session.run(["y"], feeds)[0])]

    return run


def onnx_model(case: Case, given: Problem) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    order = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}[case.cell]  # torch's blocks in ONNX's
    directions = 2 if case.bidirectional else 1
    nodes, constants = [], []

    def constant(name: str, value: Tensor) -> str:
        constants.append(numpy_helper.from_array(value.contiguous().numpy(), name))
        return name

    def weight(kind: str, layer: int) -> Tensor:
        each = [given.weights[f"{kind}_l{layer}{end}"] for end in ("", "_reverse")[:directions]]
        parts = [w.chunk(len(order)) for w in each]
        return torch.stack([torch.cat([blocks[k] for k in order]) for blocks in parts])

    sizes = constant("sizes", torch.tensor([case.T, case.B, directions * case.H]))
    x = "x"
    for k in range(case.layers):
        bias = torch.cat([weight("bias_ih", k), weight("bias_hh", k)], 1)
        states = [s[k * directions : (k + 1) * directions] for s in given.states]
        inputs = [
            x,
            constant(f"w{k}", weight("weight_ih", k)),
            constant(f"r{k}", weight("weight_hh", k)),
            constant(f"b{k}", bias),
            "",
            *(constant(f"s{k}{n}", s) for n, s in enumerate(states)),
        ]
        attributes: dict[str, Any] = {"hidden_size": case.H}
        attributes["direction"] = "bidirectional" if case.bidirectional else "forward"
        if case.cell == "GRU":
            attributes["linear_before_reset"] = 1
        y = "y" if k == case.layers - 1 else f"y{k}"
        nodes += [
            helper.make_node(case.cell, inputs, [f"raw{k}"], **attributes),
            helper.make_node("Transpose", [f"raw{k}"], [f"turned{k}"], perm=[0, 2, 1, 3]),
            helper.make_node("Reshape", [f"turned{k}", sizes], [y]),
        ]
        x = y
    described = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [case.T, case.B, features])
        for name, features in (("x", case.I), ("y", directions * case.H))
    ]
    graph = helper.make_graph(nodes, "case", described[:1], described[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    return bytes(model.SerializeToString())


PEERS: dict[str, Peer] = {"rnnfast": module_peer(rnnfast), "torch.nn": module_peer(nn)}
if all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime")):
    PEERS["ONNX Runtime"] = onnxruntime_peer
if importlib.util.find_spec("jax"):
    from rnnfast.cli.bench import jax_peer

    PEERS["JAX"] = jax_peer.prepare
