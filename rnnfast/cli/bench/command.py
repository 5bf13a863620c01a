"""rnnfast bench: times beside torch.nn's, and as a share of the measured peak of the machine."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from rnnfast._native import _C
from rnnfast.cli import common
from rnnfast.cli.bench.grids import GRIDS
from rnnfast.cli.bench.measure import FORWARD, GATES, SAME, TRAIN, Case, Result, measure
from rnnfast.cli.bench.peers import PEERS, frozen_peer
from rnnfast.cli.common import CommandError, duration, output_file, picture_file, positive, writing
from rnnfast.cli.info import facts
from rnnfast.cli.neighbours import Neighbours

Shape = tuple[int, int, int, int]


def cases(cells: Sequence[str], shapes: Sequence[Shape] | None, grid: str, dtype: str) -> list[Case]:
    if shapes:
        modes = (FORWARD, TRAIN)
        chosen = [Case(cell, *shape, mode) for mode in modes for cell in cells for shape in shapes]
    else:
        chosen = [case for case in GRIDS[grid]() if case.cell in cells]
    return [replace(case, dtype=dtype) for case in chosen]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=positive, help="number of threads (default: torch's)")
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


def run(args: argparse.Namespace) -> int:
    if args.threads:
        torch.set_num_threads(args.threads)
    threads = torch.get_num_threads()
    chosen = cases(args.cell or list(GATES), args.shape, args.grid, args.dtype)
    if not chosen:
        raise CommandError(f"{args.grid} has no case for {', '.join(args.cell)}")
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 130
    dtypes = sorted({case.dtype for case in chosen})
    before = {dtype: peak(dtype, threads) for dtype in dtypes}
    neighbours = Neighbours()
    beside = {"rnnfast", "torch.nn", *(args.beside or PEERS)}
    peers = {name: peer for name, peer in PEERS.items() if name in beside}
    if args.frozen:
        peers["rnnfast"] = frozen_peer
    seconds = 1.0 if args.grid == "quick" else 1.8
    results = [
        measure(case, peers, seconds)
        for case in track(chosen, "measuring", console=console, transient=True)
    ]
    others = neighbours.cores()
    warning = neighbours.warning()
    peaks = {dtype: max(before[dtype], peak(dtype, threads)) for dtype in dtypes}
    console.print(table(results, peaks, threads))
    console.print(summary(results), highlight=False)
    if warning:
        console.print(f"[yellow]{warning}[/]")
    if args.json:
        measured = record(results, peaks, threads) | {"cores_used_by_others": others}
        with writing(args.json):
            args.json.write_text(json.dumps(measured, indent=1) + "\n")
        console.print(f"samples: {args.json}", soft_wrap=True)
    if args.picture:
        with writing(args.picture):
            draw(results, threads, args.picture)
        console.print(f"picture: {args.picture}", soft_wrap=True)
    different = [result for result in results if not result.same]
    for result in different:
        console.print(f"[red]not timed, results differ:[/] {name(result.case)}")
    return 1 if different else 0


def peak(dtype: str, threads: int) -> float:
    """The largest of several measurements, in FLOP/s: other processes only lower a measurement."""
    return max(_C.peak_flops(dtype, threads, 0.1) for _ in range(5))


def name(case: Case) -> str:
    sizes = f"T={case.T} B={case.B} I={case.I} H={case.H}"
    return f"{case.cell} {case.mode} {sizes} {kind(case)}".strip()


def kind(case: Case) -> str:
    """The options of a case, as text."""
    words = [
        case.name,
        f"{case.layers} layers" if case.layers > 1 else "",
        "bidirectional" if case.bidirectional else "",
        f"proj {case.proj}" if case.proj else "",
        "packed" if case.packed else "",
        "on data" if not case.dx else "",
        case.dtype if case.dtype != "float32" else "",
    ]
    return ", ".join(word for word in words if word)


def summary(results: Sequence[Result]) -> str:
    """The geometric mean and the smallest of the ratios of each cell and mode, as text."""
    lines = []
    for mode in (FORWARD, TRAIN):
        for cell in GATES:
            timed = [r for r in results if r.timings and (r.case.cell, r.case.mode) == (cell, mode)]
            if len(timed) < 2:
                continue
            parts = []
            others = {peer for r in timed for peer in r.timings} - {"rnnfast"}
            for title, ratios in (
                ("torch.nn", [r.ratio() for r in timed]),
                ("the fastest other", [r.ratio_to_best for r in timed]),
            )[: len(others)]:
                mean = statistics.geometric_mean(ratios)
                parts.append(f"{mean:.2f} times {title} (least {min(ratios):.2f})")
            lines.append(f"{cell} {mode}: {', '.join(parts)}")
    return "\n".join(["geometric means:", *lines]) if lines else ""


def table(results: Sequence[Result], peaks: Mapping[str, float], threads: int) -> Table:
    worst = max(max(result.differences.values()) for result in results)
    limits = ", ".join(f"{SAME[dtype]:g} in {dtype}" for dtype in peaks)
    measured = ", ".join(f"{peak / 1e9:.0f} GFLOP/s in {dtype}" for dtype, peak in peaks.items())
    peers = [peer for peer in PEERS if any(peer in result.timings for result in results)]
    result_table = Table(
        title=f"rnnfast beside torch.nn, {common.threads(threads)}",
        caption="Times: median of one run (half the interquartile range). Ratio: torch.nn's time "
        f"divided by rnnfast's. Peak: rnnfast's share of the measured {measured}. "
        "Peers took turns on the same input, state and weights. Before the timing their outputs and "
        f"gradients differed by at most {worst:.0e} (limit {limits}).",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    kinds = any(kind(result.case) for result in results)
    for heading in ("cell", "T,B,I,H", *(["kind"] if kinds else []), "mode"):
        result_table.add_column(heading, no_wrap=True)
    for heading in (*peers, "ratio", "peak"):
        result_table.add_column(heading, justify="right", no_wrap=True)
    previous = None
    for result in results:
        case = result.case
        if previous not in (None, (case.cell, case.mode)):
            result_table.add_section()
        previous = (case.cell, case.mode)
        row = [case.cell, f"{case.T},{case.B},{case.I},{case.H}"]
        row += [kind(case)] if kinds else []
        row.append(case.mode)
        if result.timings:
            share = case.flops / result.timings["rnnfast"].median / peaks[case.dtype]
            row += [spread(result, peer) if peer in result.timings else "" for peer in peers]
            row += [f"{result.ratio():.2f}x", f"{share:.0%}"]
        else:
            row += ["differs"]
        result_table.add_row(*row)
    return result_table


def spread(result: Result, peer: str) -> str:
    timing = result.timings[peer]
    first, third = timing.quartiles
    return f"{duration(timing.median)} ({(third - first) / 2 / timing.median:.0%})"


def record(results: Sequence[Result], peaks: Mapping[str, float], threads: int) -> dict[str, Any]:
    """A run as JSON: without the paths of this machine, samples with four digits."""
    local = ("OpenMP runtimes mapped", "system")
    return {
        "machine": {name: value for name, value in facts().items() if name not in local},
        "threads": threads,
        "peak_flops": dict(peaks),
        "results": [
            {
                "case": asdict(result.case),
                "flops": result.case.flops,
                "differences": dict(result.differences),
                "seconds": {
                    peer: [float(f"{sample:.4g}") for sample in timing.samples]
                    for peer, timing in result.timings.items()
                },
            }
            for result in results
        ],
    }


def draw(results: Sequence[Result], threads: int, path: Path) -> None:
    from matplotlib.figure import Figure

    timed = [result for result in results if result.timings]
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
