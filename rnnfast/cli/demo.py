"""rnnfast demo: is it right here, is it faster, and does a model trained with it come out equal?"""

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
from rnnfast.cli.common import duration, picture_file, positive, seed, threads, writing
from rnnfast.cli.language import Text, Training
from rnnfast.cli.neighbours import Neighbours

# torch.nn beside itself, every weight moved by half a unit in the last place, drifts by about 1e-6
# in a hundred steps; a wrong gradient shows within ten. Later, training amplifies rounding: the
# end is judged by the mean of the last steps, as two runs on different machines would be.
FIRST = 100
FIRST_BOUND = 1e-4
LAST = 20
LAST_BOUND = 2e-2

TEMPERATURE = 0.6
SAMPLE_LINES = 6
SAMPLE_CHARACTERS = 420


@dataclass(frozen=True)
class Pair:
    """One cell's two trainings."""

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
    parser.add_argument("--steps", type=positive, default=160, help="of training (default: 160)")
    parser.add_argument("--seed", type=seed, default=0, help="default: 0")
    parser.add_argument("--threads", type=positive, help="default: torch.get_num_threads()")
    parser.add_argument(
        "--out",
        type=picture_file,
        default=Path("rnnfast-demo.png"),
        metavar="FILE",
        help="the picture (default: rnnfast-demo.png)",
    )


def run(args: argparse.Namespace) -> int:
    console = Console(highlight=False)
    text = language.read_text(args.text)
    if args.threads:
        torch.set_num_threads(args.threads)

    console.print(Rule("1. Is it right on this machine?"))
    rows = check.compare(check.QUICK, args.seed)
    console.print(check.table(rows, args.seed))

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
    console.print(table(pairs))
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
    both = Pair(*language.pair(cell, text, number))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[rate]:.1f} steps/s"),
    )
    with Progress(*columns, console=console) as progress:
        tasks = {
            each.name: progress.add_task(
                f"{cell:4} {each.name:8}", total=steps, loss=float("nan"), rate=0.0
            )
            for each in (both.torch, both.rnnfast)
        }

        def report(training: Training) -> None:
            progress.update(
                tasks[training.name],
                completed=len(training.losses),
                loss=training.losses[-1],
                rate=training.rate,
            )

        windows = text.windows(steps, number)
        language.train((both.torch, both.rnnfast), windows, report)
    return both


def table(pairs: Mapping[str, Pair]) -> Table:
    made = Table(
        caption=f"Loss differences: the largest over the first {FIRST} steps (bound "
        f"{FIRST_BOUND:g}), and of the means of the last {LAST} (bound {LAST_BOUND:g}).",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    made.add_column("cell")
    for heading in ("torch.nn", "rnnfast", "ratio", "last loss", "first steps", "last steps"):
        made.add_column(heading, justify="right", no_wrap=True)
    made.add_column("curves", no_wrap=True)
    for cell, both in pairs.items():
        made.add_row(
            cell,
            duration(both.torch.seconds),
            duration(both.rnnfast.seconds),
            f"{both.ratio:.2f}x",
            f"{end(both.rnnfast):.3f}",
            f"{both.first:.1e}",
            f"{both.last:.1e}",
            "[green]agree[/]" if both.agree else "[bold red]DIFFER[/]",
        )
    return made


def draw(pairs: Mapping[str, Pair], path: Path) -> None:
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots(1, len(pairs) + 1, width_ratios=[1.3] * len(pairs) + [1])
    for panel, (cell, both) in zip(axes, pairs.items(), strict=False):
        panel.plot(both.torch.losses, color="0.75", linewidth=4, label="torch.nn")
        panel.plot(both.rnnfast.losses, color="tab:blue", linewidth=1, label="rnnfast")
        panel.set(title=f"{cell}: loss", xlabel="training step")
        panel.legend(frameon=False)
    times = axes[-1]
    for k, both in enumerate(pairs.values()):
        times.barh(k - 0.2, both.torch.seconds, 0.36, color="0.75")
        times.barh(k + 0.2, both.rnnfast.seconds, 0.36, color="tab:blue")
        times.annotate(
            f"{both.ratio:.1f}x as fast",
            (both.rnnfast.seconds, k + 0.2),
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
    differ = [cell for cell, both in pairs.items() if not both.agree]
    if failed:
        console.print(f"[bold red]The check failed:[/] {', '.join(failed)}")
    if differ:
        console.print(f"[bold red]The loss curves differ beyond rounding:[/] {', '.join(differ)}")
    if failed or differ:
        return 1
    faster = " and ".join(f"the {cell} {both.ratio:.1f} times" for cell, both in pairs.items())
    console.print(
        "[bold green]Same answers, same training:[/] every cell is exact to rounding, the loss "
        f"curves agree, and with rnnfast {faster} as fast on {threads(torch.get_num_threads())}."
    )
    return 0
