"""Inference beside busy processes, compared with an idle machine, for rnnfast and torch.nn.

A neighbour is a busy process that is pinned to one core. It runs in a session of its own, like a
process of another container or login. A figure is a mean over some seconds, since a median would hide
the waits. Run it on an otherwise idle machine:

    python benchmarks/neighbours.py [--seconds 5]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.table import Table

import rnnfast

CASES = [("LSTM", 1, 64, 100), ("GRU", 8, 128, 100), ("LSTM", 16, 192, 60)]  # cell, B, H, T
THREADS = 2


@contextmanager
def neighbours(cores: list[int]) -> Iterator[None]:
    loop = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(loop, start_new_session=True) for _ in cores]
    try:
        for process, core in zip(processes, cores, strict=True):
            os.sched_setaffinity(process.pid, {core})
        time.sleep(0.3)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def mean(call: Callable[[], object], seconds: float) -> float:
    for _ in range(3):
        call()
    start, calls = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds:
        call()
        calls += 1
    return elapsed / calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each figure (default: 5)")
    seconds = parser.parse_args().seconds
    torch.set_num_threads(THREADS)
    cores = sorted(os.sched_getaffinity(0))
    cores_by_situation = {"one core busy": cores[:1], "all cores busy": cores}
    table = Table("case", "", "idle", *cores_by_situation)
    for cell, batch, hidden, steps in CASES:
        x = torch.randn(steps, batch, hidden)
        for package in (rnnfast, torch.nn):
            module = getattr(package, cell)(hidden, hidden)

            def call(module: torch.nn.Module = module, x: torch.Tensor = x) -> None:
                with torch.no_grad():
                    module(x)

            idle = mean(call, seconds)
            row = []
            for busy_cores in cores_by_situation.values():
                with neighbours(busy_cores):
                    slow = mean(call, seconds)
                row.append(f"{1e3 * slow:.2f} ms, {slow / idle:.1f} times")
            name = f"{cell} B={batch} H={hidden} T={steps}" if package is rnnfast else ""
            table.add_row(name, package.__name__, f"{1e3 * idle:.2f} ms", *row)
    Console().print(table)


if __name__ == "__main__":
    main()
