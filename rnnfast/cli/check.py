"""rnnfast check: the error of every cell, for rnnfast and for torch.nn.

The truth is torch.nn in float64 with the same weights and inputs. The error of a tensor is its largest
absolute difference from the truth, divided by the largest absolute value of the truth. A row of the
table shows the largest error of any tensor.

In float32 rnnfast's error must be at most twice torch.nn's error, or within a limit for rounding: a sum
of K terms is a random walk of K roundings, sqrt(K) units in the last place, and a step adds a few more.
"""

from __future__ import annotations

import argparse
import math
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import rnnfast
from rnnfast.cli.common import print_table, seed
from rnnfast.cli.inputs import random_inputs
from rnnfast.cli.reference import CoupledLSTM, CoupledLSTMCell, OriginalGRU, OriginalGRUCell

FLOAT64_LIMIT = 1e-12
FEW = 8  # the additional roundings of a step, in units in the last place


@dataclass(frozen=True)
class Subject:
    label: str
    rnnfast: Callable[..., nn.RNNBase | nn.RNNCellBase]
    torch: Callable[..., nn.RNNBase | nn.RNNCellBase]

    @property
    def is_cell(self) -> bool:
        return "Cell" in self.label


# ReLU's slope jumps at zero. Among very many units, rounding decides the sign of one that is close to
# zero, so two right gradients can differ.
MOST_RELU_UNITS = 10_000
RELU: dict[str, Any] = {"nonlinearity": "relu"}
ORIGINAL: dict[str, Any] = {"reset_after": False}
COUPLED: dict[str, Any] = {"coupled_gates": True}
SUBJECTS = (
    Subject("RNN tanh", rnnfast.RNN, nn.RNN),
    Subject("RNN relu", partial(rnnfast.RNN, **RELU), partial(nn.RNN, **RELU)),
    Subject("LSTM", rnnfast.LSTM, nn.LSTM),
    Subject("GRU", rnnfast.GRU, nn.GRU),
    Subject("LSTM coupled *", partial(rnnfast.LSTM, **COUPLED), CoupledLSTM),
    Subject("GRU original *", partial(rnnfast.GRU, **ORIGINAL), OriginalGRU),
    Subject("RNNCell tanh", rnnfast.RNNCell, nn.RNNCell),
    Subject("RNNCell relu", partial(rnnfast.RNNCell, **RELU), partial(nn.RNNCell, **RELU)),
    Subject("LSTMCell", rnnfast.LSTMCell, nn.LSTMCell),
    Subject("GRUCell", rnnfast.GRUCell, nn.GRUCell),
    Subject("LSTMCell coupled *", partial(rnnfast.LSTMCell, **COUPLED), CoupledLSTMCell),
    Subject("GRUCell original *", partial(rnnfast.GRUCell, **ORIGINAL), OriginalGRUCell),
)


@dataclass(frozen=True)
class Sizes:
    T: int
    B: int
    I: int
    H: int
    num_layers: int = 1
    bidirectional: bool = False
    batch_first: bool = False
    bias: bool = True
    state: bool = True

    @property
    def units(self) -> int:
        return self.T * self.B * self.H * self.num_layers * (2 if self.bidirectional else 1)

    @property
    def float32_limit(self) -> float:
        longest_sum = max(self.T * self.B, self.I + self.H, 4 * self.H)
        return (FEW + math.sqrt(longest_sum)) * torch.finfo(torch.float32).eps

    def options(self, is_cell: bool) -> dict[str, Any]:
        layers = {
            "num_layers": self.num_layers,
            "bidirectional": self.bidirectional,
            "batch_first": self.batch_first,
        }
        return {"bias": self.bias} | ({} if is_cell else layers)


QUICK = (
    Sizes(1, 1, 9, 65),
    Sizes(4, 3, 1, 9),
    Sizes(7, 3, 5, 17),
    Sizes(5, 2, 3, 33, num_layers=2, bidirectional=True),
    Sizes(9, 4, 17, 65, batch_first=True, state=False),
)
FULL = (
    *QUICK,
    Sizes(6, 1, 65, 257, bias=False),
    Sizes(20, 33, 31, 64, num_layers=3),
    Sizes(11, 8, 129, 100, num_layers=2, bidirectional=True, batch_first=True, state=False),
    Sizes(50, 16, 64, 128),
)


@dataclass(frozen=True)
class Errors:
    outputs: float = 0.0
    gradients: float = 0.0

    def worst(self, other: Errors) -> Errors:
        return Errors(max(self.outputs, other.outputs), max(self.gradients, other.gradients))

    def within(self, other: Errors, limit: float) -> bool:
        return self.outputs <= max(2 * other.outputs, limit) and (
            self.gradients <= max(2 * other.gradients, limit)
        )


@dataclass(frozen=True)
class Row:
    label: str
    dtype: torch.dtype
    rnnfast: Errors
    torch: Errors
    passed: bool

    @property
    def name(self) -> str:
        return f"{self.label.removesuffix(' *')} {self.dtype_name}"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=seed, help="seed of the random inputs (default: a new one)")
    parser.add_argument("--quick", action="store_true", help="small sizes only")


def run(args: argparse.Namespace) -> int:
    number = secrets.randbelow(2**31) if args.seed is None else args.seed
    console = Console(highlight=False)
    rows = compare(QUICK if args.quick else FULL, number)
    print_table(console, table(rows, number))
    failed = ", ".join(row.name for row in rows if not row.passed)
    console.print(f"[bold red]Wrong results:[/] {failed}" if failed else "All results are right.")
    return 1 if failed else 0


def compare(sizes: Sequence[Sizes], seed: int) -> list[Row]:
    rows = []
    with torch.random.fork_rng(devices=[]):
        for subject in SUBJECTS:
            for dtype in (torch.float32, torch.float64):
                torch.manual_seed(seed)
                row = Row(subject.label, dtype, Errors(), Errors(), passed=True)
                for size in sizes:
                    if "relu" in subject.label and size.units > MOST_RELU_UNITS:
                        continue
                    ours, theirs = compare_once(subject, size, dtype)
                    # In float64 torch.nn is the truth, so its error is zero.
                    limit = FLOAT64_LIMIT if dtype is torch.float64 else size.float32_limit
                    row = Row(
                        row.label,
                        dtype,
                        row.rnnfast.worst(ours),
                        row.torch.worst(theirs),
                        row.passed and ours.within(theirs, limit),
                    )
                rows.append(row)
    return rows


def compare_once(subject: Subject, sizes: Sizes, dtype: torch.dtype) -> tuple[Errors, Errors]:
    options = sizes.options(subject.is_cell)
    torch_module = subject.torch(sizes.I, sizes.H, dtype=dtype, **options)
    weights = torch_module.state_dict()
    rnnfast_module = subject.rnnfast(sizes.I, sizes.H, dtype=dtype, **options)
    rnnfast_module.load_state_dict(weights)
    truth_module = subject.torch(sizes.I, sizes.H, dtype=torch.float64, **options)
    truth_module.load_state_dict(weights)

    x, states, _ = random_inputs(torch_module, sizes.T, sizes.B)
    if not sizes.state:
        states = ()
    results = [
        evaluate(module, x, states, sizes.T) for module in (rnnfast_module, torch_module, truth_module)
    ]
    truth = results[2]
    ours, theirs = (
        Errors(largest(outputs, truth[0]), largest(gradients, truth[1]))
        for outputs, gradients in results[:2]
    )
    return ours, theirs


def evaluate(
    module: nn.Module, x: Tensor, states: Sequence[Tensor], steps: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs with and without autograd, and the gradients of a random weighted sum of them."""
    dtype = next(module.parameters()).dtype
    leaves = [t.detach().to(dtype).requires_grad_() for t in (x, *states)]
    outputs = forward(module, leaves[0], leaves[1:])
    with torch.no_grad():
        no_grad_outputs = forward(module, leaves[0], leaves[1:])
    generator = torch.Generator().manual_seed(steps)
    cotangents = [torch.randn(y.shape, generator=generator).to(dtype) for y in outputs]
    gradients = torch.autograd.grad(outputs, [*leaves, *module.parameters()], cotangents)
    return [y.detach() for y in (*outputs, *no_grad_outputs)], list(gradients)


def forward(module: nn.Module, x: Tensor, states: Sequence[Tensor]) -> list[Tensor]:
    hx: Any = None if not states else states[0] if len(states) == 1 else tuple(states)
    if not isinstance(module, nn.RNNCellBase):
        y, state = module(x, hx)
        return [y, *(state if isinstance(state, tuple) else (state,))]
    outputs = []
    for step in x:
        hx = module(step, hx)
        outputs.append(hx[0] if isinstance(hx, tuple) else hx)
    return [torch.stack(outputs), *(hx if isinstance(hx, tuple) else (hx,))]


def largest(values: Iterable[Tensor], truths: Iterable[Tensor]) -> float:
    return max(error(*pair) for pair in zip(values, truths, strict=True))


def error(value: Tensor, truth: Tensor) -> float:
    if value.shape != truth.shape:
        return float("inf")
    scale = float(truth.abs().max())
    difference = float((value.double() - truth).abs().max()) / (scale or 1.0)
    return float("inf") if math.isnan(difference) else difference


def table(rows: Sequence[Row], seed: int) -> Table:
    result = Table(
        title=f"Largest error against float64 (seed {seed})",
        caption="* torch.nn has no such cell: its columns show the cell in eager torch.",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    result.add_column("cell", no_wrap=True)
    result.add_column("dtype", no_wrap=True)
    for name in ("outputs\nrnnfast", "\ntorch.nn", "gradients\nrnnfast", "\ntorch.nn"):
        result.add_column(name, justify="right", no_wrap=True)
    result.add_column("", no_wrap=True)
    for row in rows:
        theirs = ("truth", "truth")
        if row.dtype is not torch.float64:
            theirs = (f"{row.torch.outputs:.1e}", f"{row.torch.gradients:.1e}")
        result.add_row(
            row.label,
            row.dtype_name,
            f"{row.rnnfast.outputs:.1e}",
            theirs[0],
            f"{row.rnnfast.gradients:.1e}",
            theirs[1],
            "[green]pass[/]" if row.passed else "[bold red]FAIL[/]",
        )
    return result
