"""A padded batch with `lengths=`, and the same batch as a PackedSequence, beside one without lengths.

The lengths are spread evenly up to T, in random order, so that about half of the steps are real; I=32
and H=64. Figures are times divided by the time of the batch without lengths. Run it on an otherwise
idle machine:

    python benchmarks/lengths.py [--seconds 2]
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnfast
from rnnfast.cli.bench.measure import interleave

INPUTS, HIDDEN = 32, 64
SIZES = [(10, 16), (100, 16), (1000, 8)]  # T, B


def compare(cell: str, steps: int, batch: int, train: bool, seconds: float) -> list[str]:
    module = getattr(rnnfast, cell)(INPUTS, HIDDEN)
    x, dy = torch.randn(steps, batch, INPUTS), torch.randn(steps, batch, HIDDEN)
    lengths = torch.tensor([max(1, round(steps * (b + 1) / batch)) for b in range(batch)])
    lengths = lengths[torch.randperm(batch)]
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    packed_dy = pack_padded_sequence(dy, lengths, enforce_sorted=False).data

    def run(input: Tensor | PackedSequence, dy: Tensor, **options: Tensor) -> None:
        with torch.set_grad_enabled(train):
            y, _ = module(input, **options)
        if train:
            (y if isinstance(y, Tensor) else y.data).backward(dy)
            module.zero_grad(set_to_none=True)

    jobs = {
        "without": lambda: run(x, dy),
        "lengths=": lambda: run(x, dy, lengths=lengths),
        "packed": lambda: run(packed, packed_dy),
    }
    times = interleave(jobs, seconds)
    full = times.pop("without").median
    shares = [f"{t.median / full:.2f}" for t in times.values()]
    return [
        cell,
        f"T={steps} B={batch}",
        "train" if train else "forward",
        f"{1e6 * full:.0f}",
        *shares,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each row (default: 2)")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    table = Table("cell", "", "", "without, us", "lengths=", "packed", box=None)
    for train in (True, False):
        for cell in ("LSTM", "GRU", "RNN"):
            for steps, batch in SIZES:
                table.add_row(*compare(cell, steps, batch, train, args.seconds))
    Console().print(table)


if __name__ == "__main__":
    main()
