"""Measuring without rendering: cases, the peers that run them, and interleaved timing.

A peer is a function that prepares a case and returns a job; a job runs the case once and returns
what it computed, so that peers are compared before they are timed. A new peer is one function and
one row in PEERS; None from it means that it does not do this case.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import rnnfast

GATES = {"RNN": 1, "LSTM": 4, "GRU": 3}
FORWARD = "forward"  # under no_grad
TRAIN = "train"  # forward, and the gradients of the input and of every weight

# Not an accuracy test (that is rnnfast check): only proof that peers do the same work.
SAME = {"float32": 1e-4, "float64": 1e-10}
BATCH_SECONDS = 2e-3  # quick jobs are timed several to a sample
LEAST_SAMPLES = 5


@dataclass(frozen=True)
class Case:
    cell: str
    T: int
    B: int
    I: int
    H: int
    mode: str
    dtype: str = "float32"

    @property
    def flops(self) -> float:
        """Of the matrix products; the gradients cost twice the forward pass."""
        forward = 2.0 * self.T * self.B * GATES[self.cell] * self.H * (self.I + self.H)
        return forward * (3 if self.mode == TRAIN else 1)


@dataclass(frozen=True)
class Problem:
    """What every peer is given: the same input, state, weights and gradient of the output."""

    x: Tensor
    states: tuple[Tensor, ...]
    weights: Mapping[str, Tensor]
    dy: Tensor


Job = Callable[[], Sequence[Tensor]]
Peer = Callable[[Case, Problem], Job | None]


def problem(case: Case, seed: int = 0) -> Problem:
    dtype = getattr(torch, case.dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        weights = getattr(nn, case.cell)(case.I, case.H, dtype=dtype).state_dict()
        x = torch.randn(case.T, case.B, case.I, dtype=dtype)
        dy = torch.randn(case.T, case.B, case.H, dtype=dtype)
        count = 2 if case.cell == "LSTM" else 1
        states = tuple(torch.randn(1, case.B, case.H, dtype=dtype) for _ in range(count))
    return Problem(x, states, weights, dy)


def module_peer(package: ModuleType) -> Peer:
    """A peer whose package has classes like those of torch.nn."""

    def prepare(case: Case, given: Problem) -> Job:
        training = case.mode == TRAIN
        module: nn.Module = getattr(package, case.cell)(case.I, case.H, dtype=given.x.dtype)
        module.load_state_dict(given.weights)
        module.train(training)
        x = given.x.clone().requires_grad_(training)
        hx: Any = given.states if len(given.states) == 2 else given.states[0]
        wanted = [x, *module.parameters()]

        def forward() -> Sequence[Tensor]:
            with torch.no_grad():
                y, _ = module(x, hx)
            return [y]

        def train() -> Sequence[Tensor]:
            y, _ = module(x, hx)
            return [y.detach(), *torch.autograd.grad(y, wanted, given.dy)]

        return train if training else forward

    return prepare


PEERS: dict[str, Peer] = {"rnnfast": module_peer(rnnfast), "torch.nn": module_peer(nn)}


@dataclass(frozen=True)
class Timing:
    samples: tuple[float, ...]  # seconds of one run

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        first, _, third = statistics.quantiles(self.samples, n=4, method="inclusive")
        return first, third


@dataclass(frozen=True)
class Result:
    case: Case
    timings: Mapping[str, Timing]
    differences: Mapping[str, float]  # of each peer's results from torch.nn's, relative

    def ratio(self, peer: str = "rnnfast", to: str = "torch.nn") -> float:
        return self.timings[to].median / self.timings[peer].median

    @property
    def same(self) -> bool:
        return all(each <= SAME[self.case.dtype] for each in self.differences.values())


def measure(case: Case, peers: Mapping[str, Peer], seconds: float) -> Result:
    """Times the peers only if their results agree; otherwise the timings are empty."""
    given = problem(case)
    prepared = {name: peer(case, given) for name, peer in peers.items()}
    jobs = {name: job for name, job in prepared.items() if job is not None}
    truth = jobs["torch.nn"]()
    differences = {name: difference(job(), truth) for name, job in jobs.items()}
    result = Result(case, {}, differences)
    return Result(case, interleave(jobs, seconds), differences) if result.same else result


def difference(values: Sequence[Tensor], truths: Sequence[Tensor]) -> float:
    if [value.shape for value in values] != [truth.shape for truth in truths]:
        return math.inf
    pairs = zip(values, truths, strict=True)
    worst = [float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs]
    return math.inf if any(map(math.isnan, worst)) else max(worst)


def interleave(jobs: Mapping[str, Job], seconds: float) -> dict[str, Timing]:
    """A B A B ... in one process, so that a change of the machine's speed meets every peer."""
    repeats = {name: warm_up(job, seconds / 10) for name, job in jobs.items()}
    samples: dict[str, list[float]] = {name: [] for name in jobs}
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(samples[next(iter(jobs))]) < LEAST_SAMPLES:
            for name, job in jobs.items():
                job()  # the first run after another peer's pays for its caches
                samples[name].append(clock(job, repeats[name]))
    finally:
        gc.enable()
    return {name: Timing(tuple(taken)) for name, taken in samples.items()}


def warm_up(job: Job, seconds: float) -> int:
    """Runs the job until it is warm and returns how many runs make one sample."""
    runs = [clock(job, 1)]
    while len(runs) < 3 or sum(runs) < seconds:
        runs.append(clock(job, 1))
    return math.ceil(BATCH_SECONDS / min(runs))


def clock(job: Job, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        job()
    return (time.perf_counter() - start) / repeats
