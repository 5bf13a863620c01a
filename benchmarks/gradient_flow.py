"""What gradient_flow costs: training steps inside and outside of the context, in turns.

A context is open for several steps, or is entered and left in each.

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
    """Milliseconds of a forward and backward pass: plain, in an open context, in one of its own."""
    torch.manual_seed(0)
    module, x = getattr(rnnfast, cell)(hidden, hidden), torch.randn(steps, batch, hidden)

    def plain(repeats: int) -> None:
        for _ in range(repeats):
            module(x)[0].sum().backward()

    def in_one_context(repeats: int) -> None:
        with rnnfast.gradient_flow(module):
            plain(repeats)

    def in_contexts(repeats: int) -> None:
        for _ in range(repeats):
            in_one_context(1)

    ways, samples = (plain, in_one_context, in_contexts), ([], [], [])
    start = time.perf_counter()
    in_contexts(3)
    repeats = max(1, round(0.05 * 3 / (time.perf_counter() - start)))
    for _ in range(rounds):
        for way, times in zip(ways, samples, strict=True):
            start = time.perf_counter()
            way(repeats)
            times.append((time.perf_counter() - start) / repeats * 1e3)
    return list(samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=31)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    table = Table("case", "plain, ms", "in an open context", "in a context of its own")
    table.caption = "Medians of the ratios to plain, and their quartiles."
    for cell in ("LSTM", "GRU", "RNN"):
        for case in CASES:
            plain, *recorded = step_times(cell, *case, arguments.rounds)
            row = [f"{cell} T={case[0]} B={case[1]} H={case[2]}", f"{statistics.median(plain):.2f}"]
            for times in recorded:
                ratios = [b / a for a, b in zip(plain, times, strict=True)]
                low, middle, high = statistics.quantiles(ratios, n=4)
                row.append(f"{middle:.3f} ({low:.3f}-{high:.3f})")
            table.add_row(*row)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
