"""What rnnfast is measured beside.

A peer is a function that prepares a case and returns a job; a job runs the case once and returns
what it computed. A new peer is one function and one row in PEERS; None from it means that it does not
do this case.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import warnings
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


class _WithStates(nn.Module):
    """A module with its initial states, as a program of one input and one output."""

    def __init__(self, case: Case, given: Problem) -> None:
        super().__init__()
        self.rnn = getattr(rnnfast, case.cell)(case.I, case.H, **given.options)
        self.rnn.load_state_dict(given.weights)
        self.states = given.states

    def forward(self, x: Tensor) -> Any:
        return self.rnn(x, self.states if len(self.states) == 2 else self.states[0])[0]


def onnxruntime_peer(case: Case, given: Problem) -> Job | None:
    """ONNX's own recurrent operators, as the exporter writes them, in ONNX Runtime."""
    if case.mode == TRAIN or case.packed or case.proj or case.dtype != "float32":
        return None
    import onnxruntime

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about its own parts
        logging.disable(logging.WARNING)
        model = _WithStates(case, given).eval()
        program = torch.onnx.export(model, (given.x,), dynamo=True, verbose=False)
        logging.disable(logging.NOTSET)
    assert program is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feeds = {session.get_inputs()[0].name: given.x.numpy()}

    def run() -> Sequence[Tensor]:
        return [torch.from_numpy(session.run(None, feeds)[0])]

    return run


PEERS: dict[str, Peer] = {"rnnfast": module_peer(rnnfast), "torch.nn": module_peer(nn)}
if all(importlib.util.find_spec(name) for name in ("onnxruntime", "onnxscript")):
    PEERS["ONNX Runtime"] = onnxruntime_peer
if importlib.util.find_spec("jax"):
    from rnnfast.cli.bench import jax_peer

    PEERS["JAX"] = jax_peer.prepare
