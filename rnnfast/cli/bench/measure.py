"""Measurements without output: cases, the inputs of every peer, and timing in turns."""

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

from rnnfast.cli.inputs import random_inputs

GATES = {"RNN": 1, "LSTM": 4, "GRU": 3}
FORWARD = "forward"  # under no_grad
TRAIN = "train"  # forward, and the gradients of the input and of every weight

# The limits show only that peers compute the same thing; rnnfast check tests the accuracy.
SAME = {"float32": 1e-4, "float64": 1e-10, "bfloat16": 0.1}
BATCH_SECONDS = 2e-3  # a sample is the mean of several runs if a run is shorter
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
    packed: bool = False  # lengths are uniform from 1 to T
    dx: bool = True  # whether training computes the gradient of the input
    name: str = ""

    def on_data(self) -> Case:
        """The same case with an input that needs no gradient."""
        return dataclasses.replace(self, dx=False)

    def lengths(self) -> Tensor:
        if not self.packed:
            return torch.full((self.B,), self.T)
        generator = torch.Generator().manual_seed(0)
        return torch.randint(1, self.T + 1, (self.B,), generator=generator).sort(descending=True).values

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def weights(self) -> list[tuple[int, int]]:
        """How many weights the input and the states of each layer have, in one direction."""
        output, rows = self.proj or self.H, GATES[self.cell] * self.H
        inputs = [self.I] + [self.directions * output] * (self.layers - 1)
        return [(rows * features, rows * output + self.H * self.proj) for features in inputs]

    @property
    def flops(self) -> float:
        """Operations of the matrix products; each gradient needs as many as the forward pass."""
        times = 1 if self.mode == FORWARD else 3
        products = times * sum(inputs + states for inputs, states in self.weights)
        if self.mode == TRAIN and not self.dx:
            products -= self.weights[0][0]
        return 2.0 * self.directions * products * float(self.lengths().sum())


@dataclass(frozen=True)
class Problem:
    """The tensors of a case, the same for every peer: input, states, weights and output gradient."""

    options: Mapping[str, Any]  # arguments of the module's constructor
    x: Tensor  # [T, B, I], or packed [rows, I]
    batch_sizes: Tensor | None
    states: tuple[Tensor, ...]
    weights: Mapping[str, Tensor]
    dy: Tensor


#: Runs a case once and returns the results.
Job = Callable[[], Sequence[Tensor]]
#: Prepares a case; None means that the peer does not support the case.
Peer = Callable[[Case, Problem], Job | None]


def problem(case: Case, seed: int = 0) -> Problem:
    options: dict[str, Any] = {
        "num_layers": case.layers,
        "bidirectional": case.bidirectional,
        "dtype": getattr(torch, case.dtype),
    }
    if case.proj:
        options["proj_size"] = case.proj
    lengths = case.lengths()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = getattr(nn, case.cell)(case.I, case.H, **options)
        rows = int(lengths.sum()) if case.packed else 0
        x, states, dy = random_inputs(module, case.T, case.B, rows)
    steps = torch.arange(int(lengths[0]))
    batch_sizes = (lengths > steps[:, None]).sum(1) if case.packed else None
    return Problem(options, x, batch_sizes, states, module.state_dict(), dy)


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
    differences: Mapping[str, float]  # relative difference of each peer's results from torch.nn's

    def ratio(self, peer: str = "rnnfast", to: str = "torch.nn") -> float:
        return self.timings[to].median / self.timings[peer].median

    @property
    def ratio_to_best(self) -> float:
        """The ratio of the fastest other peer's time to rnnfast's."""
        return min(self.ratio(to=peer) for peer in self.timings if peer != "rnnfast")

    @property
    def same(self) -> bool:
        return all(value <= SAME[self.case.dtype] for value in self.differences.values())


def measure(case: Case, peers: Mapping[str, Peer], seconds: float) -> Result:
    """Time the peers if their results agree; otherwise the timings are empty. ``seconds`` in total."""
    inputs = problem(case)
    prepared = {name: peer(case, inputs) for name, peer in peers.items()}
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
    """Time jobs in short turns, so that a change of the machine's speed affects every job."""
    repeats = {name: warm_up(job, seconds / 10) for name, job in jobs.items()}
    samples: dict[str, list[float]] = {name: [] for name in jobs}
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or min(map(len, samples.values())) < LEAST_SAMPLES:
            for name, job in jobs.items():
                settle(job)
                turn = time.perf_counter() + TURN_SECONDS
                samples[name].append(clock(job, repeats[name]))
                while time.perf_counter() < turn:
                    samples[name].append(clock(job, repeats[name]))
    finally:
        gc.enable()
    return {name: Timing(tuple(times)) for name, times in samples.items()}


def settle(job: Job) -> None:
    """Run a job until its data is in the caches, and until threads of the last job stop spinning."""
    end = time.perf_counter() + SETTLE_SECONDS
    job()
    while time.perf_counter() < end:
        job()


def warm_up(job: Job, seconds: float) -> int:
    """Run the job until its speed is stable; returns the number of runs in a sample."""
    runs = [clock(job, 1)]
    while len(runs) < 3 or sum(runs) < seconds:
        runs.append(clock(job, 1))
    return math.ceil(BATCH_SECONDS / min(runs))


def clock(job: Job, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        job()
    return (time.perf_counter() - start) / repeats
