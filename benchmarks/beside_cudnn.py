"""rnnfast beside cuDNN (through torch.nn), in the same run and with torch's default settings.

With these, recurrent layers of float32 use TF32, in cuDNN and here. A row shows the median and the
quartiles of both in us per step of a sequence, measured by CUDA events in turns. `tier` is the tier
that ran, with groups x blocks. `floor` is the time of as many multiplications in one matrix product of
torch over all steps. A row that fails is an error message, and the exit status is then 1. Run it on an
idle device:

    python benchmarks/beside_cudnn.py [--quick] [--forward] [--tier cluster] [--json FILE]

`gpu/table.py` makes the table of the mode "auto" from the files.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

import rnnfast
from rnnfast.stack import cuda_plans, cuda_precision

STEPS = 256
ROUNDS = 15
PRODUCTS = 20  # between two events: one would be shorter than its launch


class Shape(NamedTuple):
    """The case of a row of the table."""

    cell: str
    dtype: torch.dtype
    hidden: int
    batch: int
    layers: int = 1
    directions: int = 1
    packed: bool = False
    steps: int = STEPS

    def __str__(self) -> str:
        name = f"{self.cell} {str(self.dtype)[6:]} {self.layers}x{self.directions} H={self.hidden}"
        name += f" B={self.batch} T={self.steps}"
        return name + " packed" * self.packed


def constants() -> list[Shape]:
    """Shapes of which the tiers cluster and grid take most: for the constants of the cost models."""
    sizes = itertools.product(("LSTM", "GRU"), (torch.bfloat16,), (256, 512), (1, 8, 32, 128))
    return [Shape(*row) for row in sizes] + [Shape("GRU", torch.float32, 256, b) for b in (1, 32)]


def shapes(quick: bool) -> list[Shape]:
    widths, batches = (256, 512, 1024), (1, 8, 32, 128)
    if quick:
        widths, batches = (256, 1024), (1, 32)
    dtypes = (torch.bfloat16, torch.float32)
    grid = [Shape(*row) for row in itertools.product(("GRU",), dtypes, widths, batches)]
    grid += [Shape("LSTM", torch.bfloat16, h, b) for h, b in itertools.product(widths, batches)]
    grid += [Shape("LSTM", torch.float16, h, b) for h, b in itertools.product(widths, batches)]
    grid += [Shape(cell, torch.bfloat16, h, 8) for cell in ("LSTM", "GRU") for h in (64, 128)]
    grid += [Shape("LSTM", torch.bfloat16, h, 32, 2, 2) for h in (256, 512)]
    grid += [Shape("GRU", torch.bfloat16, 512, 32, packed=True)]
    if not quick:
        short = itertools.product((("LSTM", 256, 8), ("LSTM", 512, 32), ("GRU", 512, 8)), (1, 16, 64))
        grid += [Shape(cell, torch.bfloat16, h, b, steps=steps) for (cell, h, b), steps in short]
    return grid


def pair(shape: Shape) -> tuple[torch.nn.Module, torch.nn.Module, Any]:
    """The modules of rnnfast and torch.nn with the same weights, and an input."""
    torch.manual_seed(0)
    sizes = (shape.hidden, shape.hidden, shape.layers)
    options = {"bidirectional": shape.directions == 2, "device": "cuda", "dtype": shape.dtype}
    ours = getattr(rnnfast, shape.cell)(*sizes, **options)
    theirs = getattr(torch.nn, shape.cell)(*sizes, **options)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(shape.steps, shape.batch, shape.hidden, device="cuda", dtype=shape.dtype)
    if shape.packed:
        lengths = torch.randint(1, shape.steps + 1, (shape.batch,)).sort(descending=True)[0]
        x = torch.nn.utils.rnn.pack_padded_sequence(x, lengths)
    return ours, theirs, x


def step_of(module: torch.nn.Module, x: Any, forward_only: bool) -> Callable[[], None]:
    def run() -> None:
        if forward_only:
            with torch.no_grad():
                module(x)
            return
        module.zero_grad()
        y = module(x)[0]
        y = y if isinstance(y, torch.Tensor) else y.data
        y.backward(torch.ones_like(y))

    return run


def interleave(runs: list[Callable[[], None]], rounds: int = ROUNDS) -> list[list[float]]:
    """The times of each run in milliseconds; the runs take turns, `rounds` times."""
    for run in runs:
        for _ in range(3):
            run()
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, each in zip(runs, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            each.append(start.elapsed_time(end))
    return times


def floor(shape: Shape, forward_only: bool) -> float:
    """The time of all products of a step in us, computed by one product of torch over all steps.

    One product has no latency between steps and reads the weights only once.
    """
    gates = {"LSTM": 4, "GRU": 3}[shape.cell]
    w = torch.randn(shape.hidden, gates * shape.hidden, device="cuda", dtype=shape.dtype)
    h = torch.randn(shape.steps * shape.batch, shape.hidden, device="cuda", dtype=shape.dtype)

    def run() -> None:
        for _ in range(PRODUCTS):
            h @ w

    with cuda_precision.products(shape.dtype):
        times = interleave([run])[0]
    passes = (1 if forward_only else 3) * 2 * shape.layers * shape.directions  # W_ih and W_hh
    return 1e3 * statistics.median(times) / PRODUCTS * passes / shape.steps


def compare(shape: Shape, forward_only: bool) -> dict[str, Any]:
    ours, theirs, x = pair(shape)
    config = ours._config()
    data = x if isinstance(x, torch.Tensor) else x.data
    tiers = []
    for backward in (False,) if forward_only else (False, True):
        plan = cuda_plans.plan(config, data, shape.hidden, shape.batch, backward)
        tiers.append("cuDNN" if plan is None else f"{plan.tier} {plan.groups}x{plan.blocks}")
    times = interleave([step_of(m, x, forward_only) for m in (ours, theirs)])
    us = [sorted(1e3 * t / shape.steps for t in each) for each in times]
    medians = [statistics.median(each) for each in us]
    quarter = ROUNDS // 4
    kind = cuda_plans.kind_of(config, shape.dtype, not forward_only, shape.packed)
    return {
        "case": [*kind, shape.hidden, shape.batch],
        "steps": shape.steps,
        "shape": [*shape[:1], str(shape.dtype)[6:], *shape[2:]],
        "tier": " / ".join(tiers),
        "us": medians,
        "quartiles": [[each[quarter], each[-1 - quarter]] for each in us],
        "ratio": medians[1] / medians[0],
        "floor": floor(shape, forward_only),
    }


def first_line(*command: str) -> str:
    """What a program says; "unknown" without it."""
    try:
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return said.partition("\n")[0]


def facts() -> dict[str, Any]:
    """The device and the software, as the JSON file has them."""
    device = torch.cuda.current_device()
    return {
        "device": torch.cuda.get_device_name(),
        "capability": cuda_plans.capability(device),
        "multiprocessors": torch.cuda.get_device_properties(device).multi_processor_count,
        "driver": first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "commit": first_line("git", "rev-parse", "HEAD"),
    }


def write(path: Path, about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    whole = path.with_suffix(".part")
    whole.write_text(json.dumps(about | {"rows": rows}, indent=1), encoding="utf-8")
    whole.replace(path)


def line_of(*columns: str) -> str:
    widths = ("<48", "<28", ">28", ">28", ">8", ">8")
    return "".join(f"{column:{width}}" for column, width in zip(columns, widths, strict=True))


def line_of_row(shape: Shape, row: dict[str, Any]) -> str:
    times = (
        f"{m:.2f} ({low:.2f} to {high:.2f})"
        for m, (low, high) in zip(row["us"], row["quartiles"], strict=True)
    )
    return line_of(str(shape), row["tier"], *times, f"{row['ratio']:.2f}", f"{row['floor']:.2f}")


def measure(chosen: list[Shape], forward_only: bool, path: Path | None) -> tuple[list[Any], int]:
    """The rows, each printed and written as soon as it is there, and how many have failed."""
    about, rows, failures = facts(), [], 0
    print(line_of("us per step", "tier", "rnnfast", "cuDNN", "ratio", "floor"))
    for shape in chosen:
        try:
            row = compare(shape, forward_only)
        except RuntimeError as error:  # memory that is not enough, for example
            failures += 1
            print(f"{shape}: {error}", flush=True)
            continue
        rows.append(row)
        print(line_of_row(shape, row), flush=True)
        if path is not None:
            write(path, about, rows)
    return rows, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="only some of the shapes")
    which.add_argument("--constants", action="store_true", help="shapes for comparing two tiers")
    parser.add_argument("--forward", action="store_true", help="inference instead of training")
    tiers = ["block", "cluster", "grid"]
    parser.add_argument(
        "--tier", choices=tiers, help="use only this tier; otherwise the first that fits"
    )
    parser.add_argument("--json", type=Path, help="write the rows to this file as well")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device")
    try:
        rnnfast.cuda.enable(True)
    except RuntimeError as error:  # without the kernels
        parser.error(str(error))
    os.environ["RNNFAST_CUDA_TIER"] = arguments.tier or "first"
    chosen = constants() if arguments.constants else shapes(arguments.quick)
    rows, failures = measure(chosen, arguments.forward, arguments.json)
    for cell, dtype in sorted({(row["shape"][0], row["shape"][1]) for row in rows}):
        ratios = [row["ratio"] for row in rows if row["shape"][:2] == [cell, dtype]]
        mean, least = statistics.geometric_mean(ratios), min(ratios)
        print(f"{cell} {dtype}: geometric mean {mean:.2f}, least {least:.2f}")
    print(f"{len(rows)} rows, {failures} failed")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
