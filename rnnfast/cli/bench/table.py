"""The table that rnnfast bench prints."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from rnnfast.cli import common
from rnnfast.cli.bench.floors import MOST_OF_PRODUCTS, Floor, Rates, has_products, share_of_peak
from rnnfast.cli.bench.measure import FORWARD, GATES, SAME, TRAIN, Case, Result
from rnnfast.cli.bench.peers import PEERS


@dataclass(frozen=True)
class Row:
    result: Result
    floor: Floor

    @property
    def share(self) -> float:
        """The floor divided by rnnfast's time."""
        return self.floor.seconds / self.result.timings["rnnfast"].median


def name(case: Case) -> str:
    sizes = f"T={case.T} B={case.B} I={case.I} H={case.H}"
    dtype = case.dtype if case.dtype != "float32" else ""
    return " ".join(filter(None, (case.cell, case.mode, sizes, dtype, kind(case))))


def kind(case: Case) -> str:
    """The options of a case besides sizes and dtype, as text."""
    words = [
        case.name,
        f"{case.layers} layers" if case.layers > 1 else "",
        "bidirectional" if case.bidirectional else "",
        f"proj {case.proj}" if case.proj else "",
        "packed" if case.packed else "",
        "on data" if not case.dx else "",
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


def products_alone(cases: Sequence[Case], rates: Rates) -> str:
    """The speed of the products of a step without its formula, as text."""
    lines = []
    measured = [case for case in cases if has_products(case)]
    for cell in GATES:
        shares = {(c.B, c.H): share_of_peak(c, rates) for c in measured if c.cell == cell}
        if shares:
            (batch, hidden), least = min(shares.items(), key=lambda item: item[1])
            lines.append(f"{cell} {least:.0%} (B={batch} H={hidden}) to {max(shares.values()):.0%}")
    if len(measured) < len(cases):
        lines.append(f"not measured where B or H is above {MOST_OF_PRODUCTS}")
    return f"recurrent products alone, of the peak: {', '.join(lines)}"


def fitted(rows: Sequence[Row], peaks: Mapping[str, float], threads: int, console: Console) -> Table:
    """The table, without spreads of times and seconds of floors where the console is too narrow."""
    wide = table(rows, peaks, threads, details=True)
    unbounded = console.options.update(max_width=1000)
    fits = console.measure(wide, options=unbounded).maximum <= console.width
    return wide if fits else table(rows, peaks, threads, details=False)


def table(rows: Sequence[Row], peaks: Mapping[str, float], threads: int, details: bool) -> Table:
    results = [row.result for row in rows]
    peers = [peer for peer in PEERS if any(peer in result.timings for result in results)]
    kinds = any(kind(result.case) for result in results)
    dtypes = ", ".join(sorted({result.case.dtype for result in results}))
    result_table = Table(
        title=f"rnnfast beside torch.nn, {dtypes}, {common.threads(threads)}",
        caption=caption(results, peaks, details),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    result_table.add_column("T,B,I,H", no_wrap=True)
    if kinds:
        result_table.add_column("kind", min_width=8)
    for heading in (*peers, "ratio", "floor", "share"):
        result_table.add_column(heading.replace(" ", "\n"), justify="right", no_wrap=True)
    group = None
    for row in rows:
        case, timings = row.result.case, row.result.timings
        if group != (case.cell, case.mode):
            if group is not None:
                result_table.add_section()
            group = case.cell, case.mode
            result_table.add_row(f"{case.cell} {case.mode}", style="bold")
        cells = [f"{case.T},{case.B},{case.I},{case.H}"]
        cells += [kind(case)] if kinds else []
        if timings:
            cells += [time(row.result, peer, details) if peer in timings else "" for peer in peers]
            seconds = f"{common.duration(row.floor.seconds)} " if details else ""
            cells += [f"{row.result.ratio():.2f}x", f"{seconds}{row.floor.name}", f"{row.share:.0%}"]
        else:
            cells += ["differs"]
        result_table.add_row(*cells)
    return result_table


def caption(results: Sequence[Result], peaks: Mapping[str, float], details: bool) -> str:
    dtypes = sorted({result.case.dtype for result in results})
    worst = max(max(result.differences.values()) for result in results)
    limits = ", ".join(f"{SAME[dtype]:g} in {dtype}" for dtype in dtypes)
    measured = ", ".join(f"{unit} {peak / 1e9:.0f}" for unit, peak in peaks.items())
    spread = " (half the interquartile range)" if details else ""
    return (
        f"Times: median of one run{spread}. Ratio: torch.nn's time divided by rnnfast's. Floor: the "
        "least time on this machine, and what needs it: the products, the gates, or the reading of the "
        f"weights. Share: the floor divided by rnnfast's time. Measured peaks, GFLOP/s: {measured}. "
        "Peers took turns on the same input, state and weights. Before the timing their outputs and "
        f"gradients differed by at most {worst:.0e} (limit {limits})."
    )


def time(result: Result, peer: str, details: bool) -> str:
    timing = result.timings[peer]
    first, third = timing.quartiles
    spread = f" ({(third - first) / 2 / timing.median:.0%})" if details else ""
    return common.duration(timing.median) + spread
