"""What gradient_flow costs: training steps inside and outside of the context, in turns.

python benchmarks/gradient_flow.py [--threads N] [--rounds N]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table

import rnnfast

CASES = [  # T, B, H
    (50, 1, 128),
    (50, 32, 128),
    (100, 8, 256),
    (50, 128, 256),
    (50, 32, 512),
]


def step_times(cell: str, steps: int, batch: int, hidden: int, rounds: int) -> list[list[float]]:
    """Milliseconds of a forward and backward pass, without and with gradient_flow."""
    torch.manual_seed(0)
    module, x = getattr(rnnfast, cell)(hidden, hidden), torch.randn(steps, batch, hidden)

    def plain() -> None:
        module(x)[0].sum().backward()

    def recorded() -> None:
        with rnnfast.gradient_flow(module):
            plain()

    ways, samples = (plain, recorded), ([], [])
    start = time.perf_counter()
    for _ in range(3):
        recorded()
    repeats = max(1, round(0.05 * 3 / (time.perf_counter() - start)))
    for _ in range(rounds):
        for way, times in zip(ways, samples, strict=True):
            start = time.perf_counter()
            for _ in range(repeats):
                way()
            times.append((time.perf_counter() - start) / repeats * 1e3)
    return list(samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=31)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    table = Table("case", "plain, ms", "gradient_flow, ms", "median of the ratios (quartiles)")
    for cell in ("LSTM", "GRU", "RNN"):
        for case in CASES:
            plain, recorded = step_times(cell, *case, arguments.rounds)
            ratios = [b / a for a, b in zip(plain, recorded, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            name = f"{cell} T={case[0]} B={case[1]} H={case[2]}"
            medians = (f"{statistics.median(times):.2f}" for times in (plain, recorded))
            table.add_row(name, *medians, f"{middle:.3f} ({low:.3f}-{high:.3f})")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
