"""How busy other processes keep the cores of this process: they disturb measurements."""

from __future__ import annotations

import os
import time

import psutil

WORTH_SAYING = 0.1  # cores


class Neighbours:
    """Measures from its creation on; without a result if the system does not tell the CPU affinity."""

    def __init__(self) -> None:
        self.start = time.perf_counter(), busy_seconds(), time.process_time()

    def cores(self) -> float | None:
        """The average number of this process's cores that other processes used; None if unknown."""
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
            f"Other processes used {cores:.1f} of {len(os.sched_getaffinity(0))} cores during the "
            "measurement. An idle machine gives other times and other ratios."
        )


def busy_seconds() -> float | None:
    """Busy time, of all processes and with stolen time, of the cores that this process may use."""
    process = psutil.Process()
    if not hasattr(process, "cpu_affinity"):
        return None
    cores = psutil.cpu_times(percpu=True)
    times = [cores[number] for number in process.cpu_affinity() if number < len(cores)]
    busy = ("user", "nice", "system", "irq", "softirq", "steal")
    return float(sum(getattr(core, kind, 0.0) for core in times for kind in busy))
