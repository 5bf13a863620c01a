"""The peers of rnnfast bench: rnnfast, torch.nn, ONNX Runtime and JAX.

A peer is a function that prepares a case and returns a job, or None if it does not support the case. A
job runs the case once and returns the results. A new peer is one function and one row in PEERS.
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
    """A peer for a package with classes like torch.nn's. The job runs inside ``context(module)``."""

    def prepare(case: Case, problem: Problem) -> Job:
        training = case.mode == TRAIN
        module: nn.Module = getattr(package, case.cell)(case.I, case.H, **problem.options)
        module.load_state_dict(problem.weights)
        module.train(training)
        x = problem.x.clone().requires_grad_(training and case.dx)
        inputs = x if problem.batch_sizes is None else PackedSequence(x, problem.batch_sizes)
        hx: Any = problem.states if len(problem.states) == 2 else problem.states[0]
        wanted = [x, *module.parameters()] if case.dx else list(module.parameters())

        contexts = contextlib.ExitStack()
        contexts.enter_context(context(module))

        def run(contexts: contextlib.ExitStack = contexts) -> Tensor:  # open while the job lives
            y, _ = module(inputs, hx)
            return y.data if isinstance(y, PackedSequence) else y

        def forward() -> Sequence[Tensor]:
            with torch.no_grad():
                return [run()]

        def train() -> Sequence[Tensor]:
            y = run()
            return [y.detach(), *torch.autograd.grad(y, wanted, problem.dy)]

        return train if training else forward

    return prepare


def frozen_peer(case: Case, problem: Problem) -> Job | None:
    """The peer rnnfast in the context of rnnfast.frozen, which is open while the job lives."""
    return module_peer(rnnfast, rnnfast.frozen)(case, problem)


class _WithStates(nn.Module):
    """A module with fixed initial states: one input and one output."""

    def __init__(self, case: Case, problem: Problem) -> None:
        super().__init__()
        self.rnn = getattr(rnnfast, case.cell)(case.I, case.H, **problem.options)
        self.rnn.load_state_dict(problem.weights)
        self.states = problem.states

    def forward(self, x: Tensor) -> Any:
        return self.rnn(x, self.states if len(self.states) == 2 else self.states[0])[0]


def onnxruntime_peer(case: Case, problem: Problem) -> Job | None:
    """ONNX's recurrent operators from torch's exporter, run by ONNX Runtime."""
    if case.mode == TRAIN or case.packed or case.proj or case.dtype != "float32":
        return None
    import onnxruntime

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns of its own parts
        logging.disable(logging.WARNING)
        try:
            model = _WithStates(case, problem).eval()
            program = torch.onnx.export(model, (problem.x,), dynamo=True, verbose=False)
        finally:
            logging.disable(logging.NOTSET)
    assert program is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feeds = {session.get_inputs()[0].name: problem.x.numpy()}

    def run() -> Sequence[Tensor]:
        return [torch.from_numpy(session.run(None, feeds)[0])]

    return run


PEERS: dict[str, Peer] = {"rnnfast": module_peer(rnnfast), "torch.nn": module_peer(nn)}
if all(importlib.util.find_spec(name) for name in ("onnxruntime", "onnxscript")):
    PEERS["ONNX Runtime"] = onnxruntime_peer
if importlib.util.find_spec("jax"):
    from rnnfast.cli.bench import jax_peer

    PEERS["JAX"] = jax_peer.prepare
