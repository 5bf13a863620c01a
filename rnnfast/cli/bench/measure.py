"""Measuring without rendering: cases, what every peer is given, and interleaved timing."""

from __future__ import annotations

import dataclasses
import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

GATES = {"RNN": 1, "LSTM": 4, "GRU": 3}
FORWARD = "forward"  # under no_grad
TRAIN = "train"  # forward, and the gradients of the input and of every weight

# Not an accuracy test (that is rnnfast check): only proof that peers do the same work.
SAME = {"float32": 1e-4, "float64": 1e-10, "bfloat16": 0.1}
BATCH_SECONDS = 2e-3  # quick jobs are timed several to a sample
LEAST_SAMPLES = 5
SETTLE_SECONDS = 0.05
TURN_SECONDS = 0.1


@dataclass(frozen=True)
class Case:
    cell: str
    T: int
    B: int
    I: int
    H: int
    mode: str
    dtype: str = "float32"
    layers: int = 1
    bidirectional: bool = False
    proj: int = 0
    packed: bool = False  # rows of 1 to T steps, uniformly
    dx: bool = True  # whether training computes the gradient of the input
    name: str = ""

    def on_data(self) -> Case:
        """The same, of an input that needs no gradient."""
        return dataclasses.replace(self, dx=False)

    def lengths(self) -> Tensor:
        if not self.packed:
            return torch.full((self.B,), self.T)
        generator = torch.Generator().manual_seed(0)
        return torch.randint(1, self.T + 1, (self.B,), generator=generator).sort(descending=True).values

    @property
    def flops(self) -> float:
        """Of the matrix products; each gradient costs as much as the forward pass."""
        directions = 2 if self.bidirectional else 1
        output = self.proj or self.H
        inputs = [self.I] + [directions * output] * (self.layers - 1)
        passes = [1 if self.mode == FORWARD else 3] * self.layers
        flops = 0.0
        for layer, (features, times) in enumerate(zip(inputs, passes, strict=True)):
            gates = GATES[self.cell] * self.H
            forward = gates * (features + output) + self.H * self.proj
            spared = gates * features if layer == 0 and times == 3 and not self.dx else 0
            flops += 2.0 * directions * (times * forward - spared)
        return flops * float(self.lengths().sum())


@dataclass(frozen=True)
class Problem:
    """What every peer is given: the same input, state, weights and gradient of the output."""

    options: Mapping[str, Any]  # of the module's constructor
    x: Tensor  # [T, B, I], or packed [rows, I]
    batch_sizes: Tensor | None
    states: tuple[Tensor, ...]
    weights: Mapping[str, Tensor]
    dy: Tensor


#: Runs a case once and returns what it computed.
Job = Callable[[], Sequence[Tensor]]
#: Prepares a case; None means that it does not do this one.
Peer = Callable[[Case, Problem], Job | None]


def problem(case: Case, seed: int = 0) -> Problem:
    dtype = getattr(torch, case.dtype)
    options: dict[str, Any] = {
        "num_layers": case.layers,
        "bidirectional": case.bidirectional,
        "dtype": dtype,
    }
    if case.proj:
        options["proj_size"] = case.proj
    directions = 2 if case.bidirectional else 1
    lengths = case.lengths()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        weights = getattr(nn, case.cell)(case.I, case.H, **options).state_dict()
        leading = (int(lengths.sum()),) if case.packed else (case.T, case.B)
        x = torch.randn(*leading, case.I, dtype=dtype)
        dy = torch.randn(*leading, directions * (case.proj or case.H), dtype=dtype)
        sizes = [case.proj or case.H, case.H] if case.cell == "LSTM" else [case.H]
        states = tuple(torch.randn(case.layers * directions, case.B, n, dtype=dtype) for n in sizes)
    steps = torch.arange(int(lengths[0]))
    batch_sizes = (lengths > steps[:, None]).sum(1) if case.packed else None
    return Problem(options, x, batch_sizes, states, weights, dy)


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
    def ratio_to_best(self) -> float:
        """Against the fastest of the others."""
        return min(self.ratio(to=peer) for peer in self.timings if peer != "rnnfast")

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
    """In short turns in one process, so that a change of the machine's speed meets every peer."""
    repeats = {name: warm_up(job, seconds / 10) for name, job in jobs.items()}
    samples: dict[str, list[float]] = {name: [] for name in jobs}
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(samples[next(iter(jobs))]) < LEAST_SAMPLES:
            for name, job in jobs.items():
                settle(job)
                turn = time.perf_counter() + TURN_SECONDS
                samples[name].append(clock(job, repeats[name]))
                while time.perf_counter() < turn:
                    samples[name].append(clock(job, repeats[name]))
    finally:
        gc.enable()
    return {name: Timing(tuple(taken)) for name, taken in samples.items()}


def settle(job: Job) -> None:
    """Until the caches are this peer's, and the other's threads have stopped spinning."""
    end = time.perf_counter() + SETTLE_SECONDS
    job()
    while time.perf_counter() < end:
        job()


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
