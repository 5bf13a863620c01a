"""rnnfast bench: times beside torch.nn's, and beside the least time that the machine could need."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.progress import Progress

from rnnfast.cli import common
from rnnfast.cli.bench.floors import ITEM_BYTES, Rates, floor, rates_for, unit
from rnnfast.cli.bench.grids import GRIDS
from rnnfast.cli.bench.measure import FORWARD, GATES, SAME, TRAIN, Case, Result, measure
from rnnfast.cli.bench.peers import PEERS, frozen_peer
from rnnfast.cli.bench.table import Row, fitted, name, products_alone, summary
from rnnfast.cli.common import (
    CommandError,
    output_file,
    picture_file,
    positive,
    print_table,
    thread_count,
    writing,
)
from rnnfast.cli.info import facts
from rnnfast.cli.neighbours import Neighbours

Shape = tuple[int, int, int, int]

#: Of the files that --json writes. 1, which has no number of its own, has no floors and the peak of one
#: unit.
SCHEMA = 2

#: For how many seconds a case is measured: in the grid `quick`, and otherwise.
QUICK_SECONDS, SECONDS = 1.0, 1.8


def cases(cells: Sequence[str], shapes: Sequence[Shape] | None, grid: str, dtype: str) -> list[Case]:
    if shapes:
        modes = (FORWARD, TRAIN)
        chosen = [Case(cell, *shape, mode) for mode in modes for cell in cells for shape in shapes]
    else:
        chosen = [case for case in GRIDS[grid]() if case.cell in cells]
    return [replace(case, dtype=dtype) for case in chosen]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=thread_count, help="number of threads (default: torch's)")
    parser.add_argument(
        "--cell", choices=list(GATES), action="append", help="only this cell; repeatable"
    )
    parser.add_argument(
        "--shape",
        type=shape,
        action="append",
        metavar="T,B,I,H",
        help="a shape instead of a grid; repeatable",
    )
    parser.add_argument(
        "--dtype", choices=list(SAME), default="float32", help="of all cases (default: float32)"
    )
    parser.add_argument("--grid", choices=list(GRIDS), default="default", help="a named list of cases")
    parser.add_argument(
        "--quick",
        action="store_const",
        const="quick",
        dest="grid",
        help="the grid of four cases, with less time for each",
    )
    parser.add_argument(
        "--frozen", action="store_true", help="keep rnnfast's packed weights in inference"
    )
    parser.add_argument(
        "--beside",
        choices=[name for name in PEERS if name != "rnnfast"],
        action="append",
        help="time rnnfast, torch.nn and this one; repeatable (default: all that are installed)",
    )
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="write all samples to this file"
    )
    parser.add_argument(
        "--picture", type=picture_file, metavar="FILE", help="draw the ratios to this file"
    )


def shape(text: str) -> Shape:
    sizes = [positive(word) for word in text.split(",")]
    if len(sizes) != 4:
        raise argparse.ArgumentTypeError(f"expected four sizes T,B,I,H, got {text!r}")
    return sizes[0], sizes[1], sizes[2], sizes[3]


def check_memory(cases: Sequence[Case]) -> None:
    """Refuse cases whose weights and input alone are larger than the memory of the machine."""
    memory = psutil.virtual_memory().total
    for case in cases:
        weights = case.directions * sum(inputs + states for inputs, states in case.weights)
        needed = ITEM_BYTES[case.dtype] * (weights + case.T * case.B * case.I)
        if needed > memory:
            raise CommandError(
                f"{name(case)} needs {needed / 2**30:.0f} GiB for weights and input; "
                f"this machine has {memory / 2**30:.0f} GiB"
            )


def run(args: argparse.Namespace) -> int:
    if args.threads:
        torch.set_num_threads(args.threads)
    threads = torch.get_num_threads()
    chosen = cases(args.cell or list(GATES), args.shape, args.grid, args.dtype)
    if not chosen:
        raise CommandError(f"{args.grid} has no case for {', '.join(args.cell)}")
    check_memory(chosen)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 130
    rates = rates_for(chosen, threads)
    neighbours = Neighbours()
    beside = {"rnnfast", "torch.nn", *(args.beside or PEERS)}
    peers = {name: peer for name, peer in PEERS.items() if name in beside}
    if args.frozen:
        peers["rnnfast"] = frozen_peer
    seconds = QUICK_SECONDS if args.grid == "quick" else SECONDS
    # `with` puts the console back before an interrupt is reported; rich.progress.track does not.
    with Progress(console=console, transient=True) as progress:
        results = [
            measure(case, peers, seconds) for case in progress.track(chosen, description="measuring")
        ]
    others = neighbours.cores()
    warning = neighbours.warning()
    rates.measure_again()
    rows = [Row(result, floor(result.case, rates)) for result in results]
    print_table(console, fitted(rows, rates.peaks, threads, console))
    console.print(summary(results), highlight=False)
    console.print(products_alone(chosen, rates), highlight=False)
    if warning:
        console.print(f"[yellow]{warning}[/]")
    if args.json:
        measured = record(rows, rates) | {"cores_used_by_others": others}
        with writing(args.json):
            args.json.write_text(json.dumps(measured, indent=1) + "\n")
        console.print(f"samples: {args.json}", soft_wrap=True)
    timed = [result for result in results if result.timings]
    if args.picture and timed:
        with writing(args.picture):
            draw(timed, threads, args.picture)
        console.print(f"picture: {args.picture}", soft_wrap=True)
    different = [result for result in results if not result.same]
    for result in different:
        console.print(f"[red]not timed, results differ:[/] {name(result.case)}")
    return 1 if different else 0


def record(rows: Sequence[Row], rates: Rates) -> dict[str, Any]:
    """A run as JSON: without the paths of this machine, samples with four digits."""
    local = ("OpenMP runtimes mapped", "system")
    return {
        "schema": SCHEMA,
        "machine": {name: value for name, value in facts().items() if name not in local},
        "threads": rates.threads,
        **rates.record(),
        "results": [
            {
                "case": asdict(row.result.case),
                "flops": row.result.case.flops,
                **dict(zip(("unit", "products_of_unit"), unit(row.result.case), strict=False)),
                "floor": asdict(row.floor),
                "differences": dict(row.result.differences),
                "seconds": {
                    peer: [float(f"{sample:.4g}") for sample in timing.samples]
                    for peer, timing in row.result.timings.items()
                },
            }
            for row in rows
        ],
    }


def draw(timed: Sequence[Result], threads: int, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.2 + 0.28 * len(timed)), layout="constrained")
    axes = figure.add_subplot()
    ratios = [result.ratio() for result in timed]
    rows = range(len(timed))
    axes.hlines(rows, 1, ratios, color="0.8", linewidth=3)
    for mode, color in ((FORWARD, "tab:blue"), (TRAIN, "tab:orange")):
        chosen = [k for k in rows if timed[k].case.mode == mode]
        axes.plot([ratios[k] for k in chosen], chosen, "o", color=color, label=mode)
    for k in rows:
        axes.annotate(
            f"{ratios[k]:.1f}", (ratios[k], k), (7, 0), textcoords="offset points", va="center"
        )
    axes.axvline(1, color="0.3", linewidth=1)
    axes.set_yticks(rows, [name(result.case) for result in timed])
    axes.set_ylim(len(timed) - 0.5, -0.5)
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(0.7, *ratios) / 1.2, max(2.0, *ratios) * 1.3)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(f"times as fast as torch.nn ({common.threads(threads)}, medians)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    figure.savefig(path, dpi=150)
