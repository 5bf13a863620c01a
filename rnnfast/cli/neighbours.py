"""How busy other work kept our cores meanwhile: it slows what it meets, and unevenly."""

from __future__ import annotations

import os
import time

import psutil

WORTH_SAYING = 0.1  # cores


class Neighbours:
    """Watches from its creation on; silent where the system does not say which cores are ours."""

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
    process = psutil.Process()
    if not hasattr(process, "cpu_affinity"):
        return None
    cores = psutil.cpu_times(percpu=True)
    times = [cores[number] for number in process.cpu_affinity() if number < len(cores)]
    busy = ("user", "nice", "system", "irq", "softirq", "steal")
    return float(sum(getattr(core, kind, 0.0) for core in times for kind in busy))
