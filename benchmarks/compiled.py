"""A training step of a model under torch.compile(fullgraph=True), beside the same eager step.

The model is a Linear, a recurrent stack and a Linear head. `step` compiles the forward pass and the
loss. `model` compiles the model alone, and the loss is eager. `linears` is a model with a Linear of the
same width instead of the recurrent stack; it shows the overhead of torch.compile for any model of this
size. Run it on an otherwise idle machine:

    python benchmarks/compiled.py [--seconds 2]
"""

from __future__ import annotations

import argparse
import time

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import rnnfast
from rnnfast.cli.bench.measure import interleave

CASES = [  # cell, layers, B, T, H
    ("LSTM", 1, 4, 10, 32),
    ("LSTM", 1, 8, 128, 128),
    ("GRU", 1, 32, 50, 128),
    ("LSTM", 2, 32, 50, 128),
    ("GRU", 2, 32, 100, 256),
    ("LSTM", 2, 64, 100, 256),
    ("linears", 1, 4, 10, 32),
    ("linears", 1, 8, 128, 128),
]
THREADS = 2


class Model(nn.Module):
    def __init__(self, cell: str, layers: int, width: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(width, width), nn.Linear(width, width)
        is_linear = cell == "linears"
        self.body = (
            nn.Linear(width, width) if is_linear else getattr(rnnfast, cell)(width, width, layers)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(torch.relu(self.embed(x)))
        return self.head(y[0] if isinstance(y, tuple) else y)


def compare(case: tuple[str, int, int, int, int], seconds: float) -> list[str]:
    cell, layers, batch, steps, width = case
    model, x = Model(cell, layers, width), torch.randn(steps, batch, width)

    def loss(model, x: torch.Tensor) -> torch.Tensor:
        return model(x).square().mean()

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    compiled_loss = torch.compile(lambda x: loss(model, x), fullgraph=True)
    ways = {
        "eager": lambda: loss(model, x),
        "step": lambda: compiled_loss(x),
        "model": lambda: loss(compiled, x),
    }

    def training(way):
        def step() -> None:
            model.zero_grad()
            way().backward()

        return step

    steps_of = {name: training(way) for name, way in ways.items()}
    start = time.perf_counter()
    steps_of["step"]()
    compilation = time.perf_counter() - start
    steps_of["model"]()
    times = {name: 1e3 * t.median for name, t in interleave(steps_of, seconds).items()}
    row = [f"{cell}, {layers} x {width}", f"B={batch} T={steps}", f"{times['eager']:.3f}"]
    row += [f"{times[name]:.3f} ({times['eager'] / times[name]:.2f}x)" for name in ("step", "model")]
    return [*row, f"{compilation:.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each row (default: 2)")
    seconds = parser.parse_args().seconds
    torch.set_num_threads(THREADS)
    table = Table("model", "batch", "eager, ms", "step, ms", "model, ms", "compilation, s")
    for case in CASES:
        table.add_row(*compare(case, seconds))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
