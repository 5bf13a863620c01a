"""The cases that rnnfast bench knows by name."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence

from rnnfast.cli.bench.measure import FORWARD, GATES, TRAIN, Case

SHAPES = ((100, 1, 128), (100, 8, 128), (100, 32, 128), (50, 128, 128), (50, 32, 256))  # T, B, H
BATCHES = (1, 8, 32, 128, 256)
HIDDEN = (64, 128, 256, 512)
MOST_FLOPS = 2e10  # of a case of the grid `random`, whose samples then take less than a second


def default() -> list[Case]:
    """Cases whose table fits one screen."""
    steps = [Case(cell, 1, 1, 256, 256, FORWARD) for cell in GATES]
    return steps + [
        Case(cell, T, B, H, H, mode)
        for mode in (FORWARD, TRAIN)
        for cell in GATES
        for T, B, H in SHAPES
    ]


def quick() -> list[Case]:
    """One case of each kind, and training with an input that needs no gradient."""
    lstm = Case("LSTM", 50, 128, 128, 128, TRAIN)
    return [
        Case("GRU", 100, 32, 128, 128, TRAIN),
        lstm,
        lstm.on_data(),
        Case("LSTM", 1, 1, 256, 256, FORWARD),
    ]


def grid(mode: str) -> list[Case]:
    """Sizes from one row of 64 units to 256 rows of 512, I = H."""
    sizes = [(B, H) for H in HIDDEN for B in BATCHES] + [(B, 1024) for B in BATCHES if B <= 32]
    return [
        Case(cell, 50 if B * H <= 2**15 and H < 1024 else 20, B, H, H, mode)
        for cell in GATES
        for B, H in sizes
    ]


def steps() -> list[Case]:
    """Single steps of a module, as in a policy or a stream."""
    return [
        Case(cell, 1, B, H, H, FORWARD)
        for cell in ("LSTM", "GRU")
        for B in (1, 8)
        for H in (128, 256, 512)
    ]


def packed() -> list[Case]:
    """Packed rows of 1 to 200 steps, and full batches of 100 steps for comparison."""
    return [
        Case(cell, T, 32, 128, 128, TRAIN, packed=T == 200)
        for cell in ("GRU", "LSTM")
        for T in (200, 100)
    ]


def users() -> list[Case]:
    """Shapes that real programs run."""
    return [
        Case("LSTM", 1, 8, 512, 128, FORWARD, name="CleanRL rollout"),
        Case("LSTM", 128, 2, 512, 128, TRAIN, name="CleanRL update"),
        Case("LSTM", 1, 1, 64, 256, FORWARD, name="SB3 policy step"),
        Case("GRU", 32, 32, 512, 512, TRAIN, name="Sample Factory"),
        Case("GRU", 1, 1, 128, 256, FORWARD, layers=3, name="RNNoise stream"),
        Case("GRU", 200, 64, 128, 256, TRAIN, layers=3, name="RNNoise training"),
        Case("LSTM", 400, 32, 257, 128, TRAIN, layers=2, name="DTLN"),
        Case("LSTM", 1, 1, 128, 128, FORWARD, name="Silero VAD"),
        Case("LSTM", 100, 32, 20, 40, TRAIN, layers=2, name="DeepAR training"),
        Case("LSTM", 1, 3200, 20, 40, FORWARD, layers=2, name="DeepAR sampling"),
        Case("LSTM", 24, 32, 1, 25, TRAIN, name="Darts"),
        Case("LSTM", 48, 128, 4, 128, TRAIN, layers=2, name="NeuralForecast"),
        Case("LSTM", 40, 32, 300, 256, TRAIN, bidirectional=True, packed=True, name="Flair"),
        Case("LSTM", 70, 64, 400, 1152, TRAIN, name="AWD-LSTM"),
        Case("LSTM", 200, 16, 80, 640, TRAIN, layers=2, bidirectional=True, proj=320, name="ESPnet"),
        Case("LSTM", 32, 64, 512, 128, FORWARD, layers=2, bidirectional=True, name="docTR"),
        Case("LSTM", 1, 1, 640, 640, FORWARD, layers=2, name="RNN-T decoder"),
        Case("LSTM", 500, 8, 76, 256, TRAIN, name="MIMIC phenotyping"),
        Case("LSTM", 32, 4096, 8, 20, TRAIN, layers=2, name="spaced repetition"),
    ]


def drawn() -> list[Case]:
    """Shapes that nobody has chosen, twenty of each cell and mode; sizes are even on a log scale."""
    generator = random.Random(0)

    def size(most: int) -> int:
        return round(math.exp(generator.uniform(0, math.log(most))))

    def case(cell: str, mode: str) -> Case:
        layers, bidirectional = generator.choice((1, 1, 2)), generator.random() < 0.25
        T, B, I, H = size(300), size(256), size(768), size(768)
        return Case(cell, T, B, I, H, mode, layers=layers, bidirectional=bidirectional)

    def cases(cell: str, mode: str) -> Iterator[Case]:
        endless = iter(lambda: case(cell, mode), None)
        return itertools.islice((c for c in endless if c.flops < MOST_FLOPS), 20)

    return [c for mode in (FORWARD, TRAIN) for cell in GATES for c in cases(cell, mode)]


GRIDS: dict[str, Callable[[], Sequence[Case]]] = {
    "default": default,
    "quick": quick,
    "training": lambda: grid(TRAIN),
    "inference": lambda: grid(FORWARD),
    "steps": steps,
    "packed": packed,
    "users": users,
    "random": drawn,
}
