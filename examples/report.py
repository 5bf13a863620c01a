"""What the examples share: options, the training loop's progress and time, the figure and the result.

`python examples/report.py RESULT.json ...` prints one table of several results, and `--write FILE` also
writes them as one list.
"""

import argparse
import json
import time
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib as mpl
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import rnnfast

mpl.use("agg")  # figures go to files

BLOCK = 10  # steps of one package before the other takes its turn
SHARE = 0.2  # this part of the steps also runs with torch.nn, for its time

# A training: takes the module that has the recurrent layers (torch.nn or rnnfast) and the number of
# steps, yields the loss of each step, and returns what it trained.
Training = Callable[[ModuleType, int], Generator[float, None, Any]]


@dataclass(frozen=True)
class Result:
    """One number of one system, beside the number that it must beat."""

    system: str
    metric: str
    value: float
    baseline: float
    baseline_name: str
    better: str  # "lower" or "higher"
    seconds: float = 0.0  # of the training
    seconds_torch: float = 0.0  # of the same training with torch.nn, from a share of its steps

    @property
    def beats_baseline(self) -> bool:
        return self.value < self.baseline if self.better == "lower" else self.value > self.baseline


@dataclass(frozen=True)
class Trained:
    model: Any
    losses: list[float]
    seconds: float
    seconds_torch: float


def parser(description: str, system: str) -> argparse.ArgumentParser:
    """The options of every example."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--package", choices=["rnnfast", "torch"], default="rnnfast", help="who trains")
    parser.add_argument("--quick", action="store_true", help="a short training")
    parser.add_argument("--steps", type=int, help="stop the training after so many steps")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to a file")
    parser.add_argument("--figure", type=Path, default=Path(f"{system}.png"), metavar="FILE")
    return parser


def train(
    training: Training, steps: int, arguments: argparse.Namespace, share: float = SHARE
) -> Trained:
    """Train for `steps` steps; time torch.nn on the first `share` of them, in turns with rnnfast."""
    if arguments.steps:
        steps = min(steps, arguments.steps)
    packages = [torch.nn] if arguments.package == "torch" else [rnnfast]
    limits = [steps]
    if packages != [torch.nn] and share:
        packages.append(torch.nn)
        limits.append(max(1, round(share * steps)))
    runs = [training(package, steps) for package in packages]
    losses: list[list[float]] = [[] for _ in runs]
    seconds = [0.0 for _ in runs]
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    columns += [TimeRemainingColumn(), TextColumn("loss {task.fields[loss]:.3f}")]
    with Progress(*columns) as progress:
        task = progress.add_task(f"training with {arguments.package}", total=steps, loss=float("nan"))
        while len(losses[0]) < steps:
            for k, (run, limit, taken) in enumerate(zip(runs, limits, losses, strict=True)):
                start = time.perf_counter()
                for _ in range(min(BLOCK, limit - len(taken))):
                    taken.append(next(run))
                seconds[k] += time.perf_counter() - start
            progress.update(task, completed=len(losses[0]), loss=losses[0][-1])
    start = time.perf_counter()
    try:
        next(runs[0])
        raise RuntimeError(f"the training has more than {steps} steps")
    except StopIteration as end:
        model = end.value
    seconds[0] += time.perf_counter() - start
    seconds_torch = seconds[-1] * steps / limits[-1]
    print(f"trained {steps} steps in {seconds[0]:.1f} s", end="")
    print("" if len(runs) == 1 else f"; torch.nn: {seconds_torch:.1f} s, from {limits[-1]} steps")
    return Trained(model, losses[0], seconds[0], seconds_torch)


def finish(result: Result, trained: Trained, figure: Any, arguments: argparse.Namespace) -> None:
    """Save the figure, print the number beside its baseline, and write the JSON file."""
    result = replace(result, seconds=trained.seconds, seconds_torch=trained.seconds_torch)
    arguments.figure.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.figure, dpi=120, bbox_inches="tight")
    print(f"{result.system}: {result.metric} {result.value:.4g}", end="")
    print(f", {result.baseline_name} {result.baseline:.4g} ({result.better} is better)")
    print(f"figure: {arguments.figure}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(asdict(result), indent=1) + "\n")


def table(results: list[Result]) -> Table:
    table = Table("system", "number", "baseline", "seconds", "seconds of torch.nn")
    for r in results:
        table.add_row(
            r.system,
            f"{r.metric} {r.value:.4g}",
            f"{r.baseline_name} {r.baseline:.4g}",
            f"{r.seconds:.0f}",
            f"{r.seconds_torch:.0f}",
        )
    return table


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("results", nargs="+", type=Path)
    options.add_argument("--write", type=Path, metavar="FILE")
    arguments = options.parse_args()
    results = [Result(**json.loads(path.read_text())) for path in arguments.results]
    Console().print(table(results))
    if arguments.write:
        arguments.write.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    behind = [result.system for result in results if not result.beats_baseline]
    if behind:
        raise SystemExit(f"behind the baseline: {', '.join(behind)}")


if __name__ == "__main__":
    main()
