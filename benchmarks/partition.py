"""The cost model's choice of a partition, beside every partition.

A partition shares a call among threads: one thread, rows of the batch, hidden units, and for stacks a
wavefront over layers. Run it on an otherwise idle machine:

    python benchmarks/partition.py [--train] [--threads N] [--seconds 2]

The last column is the best time divided by the time of the model's choice.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from rich.console import Console
from rich.table import Table

import rnnfast
from rnnfast import _C
from rnnfast.cli.bench.measure import interleave

WAYS = ("one", "rows", "units", "wavefront", "chosen")
CASES = [  # cell, layers, B, T, H
    *(("LSTM", 1, B, 50, H) for B, H in [(1, 64), (1, 256), (8, 64), (8, 256), (32, 128)]),
    *(("LSTM", 2, B, 100, H) for B, H in [(1, 64), (1, 128), (1, 256), (4, 64), (8, 128), (32, 64)]),
    *(("GRU", 3, B, 100, H) for B, H in [(1, 64), (1, 256), (4, 128), (16, 64)]),
    ("RNN", 2, 1, 100, 128),
    ("LSTM", 4, 1, 50, 512),
]


def make_call(cell, layers, B, T, H, train):
    module = getattr(rnnfast, cell)(H, H, layers)
    x, dy = torch.randn(T, B, H, requires_grad=train), torch.randn(T, B, H)

    def call():
        if train:
            torch.autograd.grad(module(x)[0], [x, *module.parameters()], dy)
        else:
            with torch.no_grad():
                module(x)

    return call


def make_forced_call(way, call):
    def run():
        _C.force_partition(way)
        call()

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--train", action="store_true", help="forward and backward")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=2.0, help="for each row (default: 2)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    table = Table("case", *WAYS, "best / chosen", title=f"us, {args.threads} threads")
    shares = []
    for cell, layers, B, T, H in CASES:
        call = make_call(cell, layers, B, T, H, args.train)
        timings = interleave({way: make_forced_call(way, call) for way in WAYS}, args.seconds)
        medians = {way: timing.median for way, timing in timings.items()}
        shares.append(min(medians.values()) / medians["chosen"])
        columns = [
            "" if way == "wavefront" and layers == 1 else f"{1e6 * medians[way]:.0f}" for way in WAYS
        ]
        table.add_row(f"{cell} {layers} x {H}, B={B} T={T}", *columns, f"{shares[-1]:.2f}")
    Console().print(table)
    print(f"best / chosen: geometric mean {statistics.geometric_mean(shares):.2f}")


if __name__ == "__main__":
    main()
