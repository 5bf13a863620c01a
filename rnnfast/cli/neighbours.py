"""How busy other work kept our cores meanwhile: it slows what it meets, and unevenly."""

from __future__ import annotations

import os
import time
from pathlib import Path

WORTH_SAYING = 0.1  # cores


class Neighbours:
    """Watches from its creation on; silent where /proc/stat does not exist."""

    def __init__(self) -> None:
        self.start = time.perf_counter(), busy_seconds(), time.process_time()

    def cores(self) -> float | None:
        """How many of the cores that this process may use were taken by others, on average."""
        began, busy_before, own_before = self.start
        busy = busy_seconds()
        if busy is None or busy_before is None:
            return None
        others = busy - busy_before - (time.process_time() - own_before)
        return max(others, 0.0) / max(time.perf_counter() - began, 1e-9)

    def warning(self) -> str:
        cores = self.cores()
        if cores is None or cores < WORTH_SAYING:
            return ""
        return (
            f"Other work kept {cores:.1f} of {len(os.sched_getaffinity(0))} cores busy meanwhile: "
            "an idle machine gives other times and other ratios."
        )


def busy_seconds() -> float | None:
    """Of the cores this process may use, by anyone, stolen time included."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    ours = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    try:
        rows = Path("/proc/stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    ticks = 0
    for name, *counts in (row.split() for row in rows if row.startswith("cpu")):
        if name in ours:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, counts[:8])
            ticks += user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK")
