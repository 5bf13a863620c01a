"""rnnfast demo: a check of the results, and the training of one model with torch.nn and rnnfast."""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.rule import Rule
from rich.table import Table

from rnnfast.cli import check, language
from rnnfast.cli.common import (
    duration,
    picture_file,
    positive,
    print_table,
    seed,
    thread_count,
    threads,
    writing,
)
from rnnfast.cli.language import Text, Training
from rnnfast.cli.neighbours import Neighbours

# If every weight changes by half a unit in the last place, the losses of torch.nn change by about 1e-6
# in a hundred steps. A wrong gradient changes them by more within ten steps. Later, training amplifies
# rounding, so the last steps are compared by their mean.
FIRST = 100  # steps
FIRST_BOUND = 1e-4
LAST = 20  # steps
LAST_BOUND = 2e-2

TEMPERATURE = 0.6
SAMPLE_LINES = 6
SAMPLE_CHARACTERS = 420


@dataclass(frozen=True)
class Pair:
    """The two trainings of one cell."""

    torch: Training
    rnnfast: Training

    @property
    def ratio(self) -> float:
        return self.torch.seconds / self.rnnfast.seconds

    @property
    def first(self) -> float:
        """The largest difference of the losses over the first steps."""
        both = zip(self.torch.losses[:FIRST], self.rnnfast.losses[:FIRST], strict=True)
        return max(abs(a - b) for a, b in both)

    @property
    def last(self) -> float:
        return abs(end(self.torch) - end(self.rnnfast))

    @property
    def agree(self) -> bool:
        return self.first <= FIRST_BOUND and self.last <= LAST_BOUND


def end(training: Training) -> float:
    return statistics.fmean(training.losses[-LAST:])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", type=Path, metavar="FILE", help="train on this UTF-8 text")
    parser.add_argument("--steps", type=positive, default=120, help="training steps (default: 120)")
    parser.add_argument("--seed", type=seed, default=0, help="random seed (default: 0)")
    parser.add_argument("--threads", type=thread_count, help="number of threads (default: torch's)")
    parser.add_argument(
        "--out",
        type=picture_file,
        default="rnnfast-demo.png",  # as text, which argparse gives to picture_file
        metavar="FILE",
        help="file of the picture (default: rnnfast-demo.png)",
    )


def run(args: argparse.Namespace) -> int:
    console = Console(highlight=False)
    text = language.read_text(args.text)
    if args.threads:
        torch.set_num_threads(args.threads)

    console.print(Rule("1. Are the results right on this machine?"))
    rows = check.compare(check.QUICK, args.seed)
    print_table(console, check.table(rows, args.seed))

    console.print(Rule("2. The same training twice"))
    console.print(
        f"A character language model (embedding, {language.LAYERS} recurrent layers, linear; "
        f"H={language.HIDDEN}, B={language.BATCH}, T={language.LENGTH}) on {text.source}: "
        f"{len(text.tokens):,} characters, {len(text.characters)} different ones. "
        f"Same weights, same batches, {threads(torch.get_num_threads())}; torch.nn and rnnfast "
        f"take turns of {language.BLOCK} steps after a warm-up that is not counted.\n"
    )
    neighbours = Neighbours()
    pairs = {cell: train(cell, text, args.steps, args.seed, console) for cell in ("GRU", "LSTM")}
    warning = neighbours.warning()
    print_table(console, table(pairs))
    if warning:
        console.print(f"[yellow]{warning}[/]")

    console.print(Rule("3. What the GRU learned with rnnfast"))
    stream = language.sample(pairs["GRU"].rnnfast.model, text, "\nThe ", TEMPERATURE, args.seed)
    written = "The " + "".join(itertools.islice(stream, SAMPLE_CHARACTERS))
    lines = [line for line in written.splitlines() if line.strip()][:SAMPLE_LINES]
    console.print("\n".join(lines), markup=False, style="italic")

    console.print(Rule("4. The picture"))
    with writing(args.out):
        draw(pairs, args.out)
    console.print(f"{args.out.resolve()}\n", soft_wrap=True)
    return verdict(rows, pairs, console)


def train(cell: str, text: Text, steps: int, number: int, console: Console) -> Pair:
    pair = Pair(*language.pair(cell, text, number))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[rate]:.1f} steps/s"),
    )
    with Progress(*columns, console=console) as progress:
        tasks = {
            training.name: progress.add_task(
                f"{cell:4} {training.name:8}", total=steps, loss=float("nan"), rate=0.0
            )
            for training in (pair.torch, pair.rnnfast)
        }

        def report(training: Training) -> None:
            progress.update(
                tasks[training.name],
                completed=len(training.losses),
                loss=training.losses[-1],
                rate=training.rate,
            )

        windows = text.windows(steps, number)
        language.train((pair.torch, pair.rnnfast), windows, report)
    return pair


def table(pairs: Mapping[str, Pair]) -> Table:
    result = Table(
        caption=f"Loss differences. First steps: the largest of the first {FIRST} steps (limit "
        f"{FIRST_BOUND:g}). Last steps: between the means of the last {LAST} (limit {LAST_BOUND:g}).",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    result.add_column("cell")
    for heading in ("torch.nn", "rnnfast", "ratio", "last loss", "first steps", "last steps"):
        result.add_column(heading, justify="right", no_wrap=True)
    result.add_column("curves", no_wrap=True)
    for cell, pair in pairs.items():
        result.add_row(
            cell,
            duration(pair.torch.seconds),
            duration(pair.rnnfast.seconds),
            f"{pair.ratio:.2f}x",
            f"{end(pair.rnnfast):.3f}",
            f"{pair.first:.1e}",
            f"{pair.last:.1e}",
            "[green]agree[/]" if pair.agree else "[bold red]DIFFER[/]",
        )
    return result


def draw(pairs: Mapping[str, Pair], path: Path) -> None:
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots(1, len(pairs) + 1, width_ratios=[1.3] * len(pairs) + [1])
    for panel, (cell, pair) in zip(axes, pairs.items(), strict=False):
        panel.plot(pair.torch.losses, color="0.75", linewidth=4, label="torch.nn")
        panel.plot(pair.rnnfast.losses, color="tab:blue", linewidth=1, label="rnnfast")
        panel.set(title=f"{cell}: loss", xlabel="training step")
        panel.legend(frameon=False)
    times = axes[-1]
    for k, pair in enumerate(pairs.values()):
        times.barh(k - 0.2, pair.torch.seconds, 0.36, color="0.75")
        times.barh(k + 0.2, pair.rnnfast.seconds, 0.36, color="tab:blue")
        times.annotate(
            f"{pair.ratio:.1f}x as fast",
            (pair.rnnfast.seconds, k + 0.2),
            (4, 0),
            textcoords="offset points",
            va="center",
        )
    times.set_yticks(range(len(pairs)), list(pairs))
    times.invert_yaxis()
    times.margins(x=0.25)
    times.set(title="training time", xlabel="seconds")
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def verdict(rows: Sequence[check.Row], pairs: Mapping[str, Pair], console: Console) -> int:
    failed = [row.label for row in rows if not row.passed]
    differing = [cell for cell, pair in pairs.items() if not pair.agree]
    if failed:
        console.print(f"[bold red]The check failed:[/] {', '.join(failed)}")
    if differing:
        console.print(f"[bold red]The loss curves differ beyond rounding:[/] {', '.join(differing)}")
    if failed or differing:
        return 1
    faster = " and ".join(f"the {cell} {pair.ratio:.1f} times" for cell, pair in pairs.items())
    console.print(
        "[bold green]Same answers, same training:[/] every cell is exact to rounding, the loss "
        f"curves agree, and with rnnfast {faster} as fast on {threads(torch.get_num_threads())}."
    )
    return 0
