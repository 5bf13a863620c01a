"""What the examples share: options, training with its progress, time and checkpoint, and the result.

`python examples/report.py RESULT.json ...` prints one table of several results, and `--write FILE` also
writes them as one list.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import matplotlib as mpl
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import rnnfast

mpl.use("agg")  # figures go to files

BLOCK = 10  # steps of one package before the other takes its turn
SHARE, MOST = 0.2, 200  # this part of the steps, at most so many, also runs with torch.nn, for its time
CHECKPOINTS = 100  # of a whole training
FIRST = os.environ.get("RANK", "0") == "0"  # torchrun's other processes print and write nothing


class Stateful(Protocol):
    """A module, an optimizer, a schedule."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


class Steps:
    """The steps of one training. A file, the checkpoint, keeps them when the program is interrupted."""

    def __init__(self, count: int, checkpoint: Path | None = None):
        self.count, self.checkpoint, self.saved = count, checkpoint, None
        self.losses: list[float] = []
        self.seconds = 0.0  # of the training alone
        self.seconds_torch = 0.0  # of the same training with torch.nn; 0 if unknown
        if checkpoint and checkpoint.exists():
            self.saved = torch.load(checkpoint)
            if (saved := self.saved["count"]) != count:
                raise SystemExit(f"{checkpoint} has a training of {saved} steps, not {count}")
            for name in "losses", "seconds", "seconds_torch":
                setattr(self, name, self.saved[name])

    def __len__(self) -> int:
        return self.count

    def resume(self, *parts: Stateful | torch.Generator | list | dict) -> Iterator[int]:
        """Count the steps from 1, or from after the checkpoint, of which the parts get their state."""
        first = 1
        if self.saved:
            for part, state in zip(parts, self.saved.pop("parts"), strict=True):
                restore(part, state)
            torch.set_rng_state(self.saved["random"])
            first += len(self.losses)
        for step in range(first, self.count + 1):
            yield step
            if self.checkpoint and (step % -(-self.count // CHECKPOINTS) == 0 or step == self.count):
                with self.untimed():
                    self.save([state_of(part) for part in parts])

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """Leave out of `seconds` what happens inside, such as an evaluation during the training."""
        start = time.perf_counter()
        yield
        self.seconds -= time.perf_counter() - start

    def save(self, parts: list[Any]) -> None:
        names = "count", "losses", "seconds", "seconds_torch"
        checkpoint = {name: getattr(self, name) for name in names}
        checkpoint |= {"parts": parts, "random": torch.get_rng_state()}
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.checkpoint.with_suffix(".new")
        torch.save(checkpoint, unfinished)
        unfinished.replace(self.checkpoint)  # An interruption leaves the old file or the new one.


def state_of(part: Any) -> Any:
    if isinstance(part, torch.Generator):
        return part.get_state()
    return part if isinstance(part, list | dict) else part.state_dict()


def restore(part: Any, state: Any) -> None:
    if isinstance(part, torch.Generator):
        part.set_state(state)
    elif isinstance(part, list | dict):
        part.clear()
        part.extend(state) if isinstance(part, list) else part.update(state)
    else:
        part.load_state_dict(state)


# A training: takes the module that has the recurrent layers (torch.nn or rnnfast) and the steps, yields
# the loss of each step, and returns what it trained.
Training = Callable[[ModuleType, Steps], Generator[float, None, Any]]


@dataclass(frozen=True)
class Result:
    """One number of one system, beside the number that it must beat."""

    system: str
    metric: str
    value: float
    baseline: float
    baseline_name: str
    better: str  # "lower" or "higher"
    seconds: float = 0.0  # of the training, without evaluations
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


def parser(description: str, system: str, checkpoint: bool = True) -> argparse.ArgumentParser:
    """The options of every example."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--package", choices=["rnnfast", "torch"], default="rnnfast", help="who trains")
    parser.add_argument("--quick", action="store_true", help="a short training")
    text = "train for N steps, with the learning-rate schedule of N steps"
    parser.add_argument("--steps", type=int, metavar="N", help=text)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to a file")
    parser.set_defaults(checkpoint=None)
    if checkpoint:
        text = "save the training here as it runs, and go on from here"
        parser.add_argument("--checkpoint", type=Path, metavar="FILE", help=text)
    parser.add_argument("--figure", type=Path, default=Path(f"{system}.png"), metavar="FILE")
    return parser


def train(
    training: Training, steps: int, arguments: argparse.Namespace, share: float = SHARE, part: str = ""
) -> Trained:
    """Train for `steps` steps; time torch.nn on the first `share` of them, in turns with rnnfast.

    `part` names the training in a program that has several. Each has its own checkpoint.
    """
    steps = min(steps, arguments.steps or steps)
    checkpoint = arguments.checkpoint
    if checkpoint and part:
        checkpoint = checkpoint.with_stem(f"{checkpoint.stem}-{part}")
    main, other = Steps(steps, checkpoint), Steps(steps)
    runs = [(training(torch.nn if arguments.package == "torch" else rnnfast, main), main, steps)]
    if arguments.package == "rnnfast" and share and not main.seconds_torch:
        runs.append((training(torch.nn, other), other, min(MOST, max(1, round(share * steps)))))
    random = [torch.get_rng_state()] * len(runs)
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    columns += [TimeRemainingColumn(), TextColumn("loss {task.fields[loss]:.3f}")]
    with Progress(*columns, disable=not FIRST) as progress:
        task = progress.add_task(f"training with {arguments.package}", total=steps, loss=float("nan"))
        while len(main.losses) < steps:
            for k, (run, taken, limit) in enumerate(runs):
                torch.set_rng_state(random[k])
                for _ in range(min(BLOCK, limit - len(taken.losses))):
                    start = time.perf_counter()
                    taken.losses.append(next(run))
                    taken.seconds += time.perf_counter() - start
                random[k] = torch.get_rng_state()
            if other.losses:
                main.seconds_torch = other.seconds / len(other.losses) * steps
            progress.update(task, completed=len(main.losses), loss=main.losses[-1])
    try:
        next(runs[0][0])
        raise RuntimeError(f"the training has more than {steps} steps")
    except StopIteration as end:
        model = end.value
    if FIRST:
        print(f"trained {steps} steps in {main.seconds:.1f} s", end="")
        print(f"; torch.nn: about {main.seconds_torch:.1f} s" if main.seconds_torch else "")
    return Trained(model, main.losses, main.seconds, main.seconds_torch)


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
