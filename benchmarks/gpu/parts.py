"""Where the time of a training step on a GPU goes, for rnnfast and cuDNN, in us per step of a sequence.

    python benchmarks/gpu/parts.py [--quick]

For each shape: the plans, the time of an eager call and of a replayed CUDA graph, and the device time
of the recurrences, the matrix products and everything else by torch's profiler, as the median of five
runs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

import rnnfast
from rnnfast.stack import cuda_plans

STEPS = 256
PROFILED = 5  # runs
#: A part of a kernel's name, and what the kernel belongs to; the first that fits counts.
PARTS = {
    "forward_kernel": "recurrence forward",
    "backward_kernel": "recurrence backward",
    **dict.fromkeys(("gemm", "Gemm", "cutlass", "nvjet"), "products"),
}


def shapes() -> list[tuple[str, torch.dtype, int, int]]:
    all_shapes = [
        ("LSTM", torch.bfloat16, h, b) for h in (128, 256, 512, 1024) for b in (1, 8, 32, 128)
    ]
    all_shapes += [("GRU", torch.bfloat16, h, b) for h in (256, 512, 1024) for b in (8, 128)]
    return all_shapes + [("GRU", torch.float32, h, b) for h in (256, 1024) for b in (8, 128)]


def timed(run: Callable[[], None], rounds: int = 20) -> float:
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return 1e3 * statistics.median(times) / STEPS


def device_times(run: Callable[[], None]) -> dict[str, float]:
    """The medians of several runs. A part that some runs lack counts as zero there."""
    runs = [device_times_of_one(run) for _ in range(PROFILED)]
    names = {name for times in runs for name in times}
    return {name: statistics.median(times.get(name, 0.0) for times in runs) for name in names}


def device_times_of_one(run: Callable[[], None]) -> dict[str, float]:
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize()
    times: dict[str, float] = {}
    for kernel in recorded.key_averages():
        name = next((part for word, part in PARTS.items() if word in kernel.key), "other")
        times[name] = times.get(name, 0.0) + kernel.self_device_time_total / STEPS
    return {name: time for name, time in times.items() if time > 0}


def replay_of(run: Callable[[], None]) -> Callable[[], None]:
    """A CUDA graph of a step."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def line_of(module: torch.nn.Module, x: torch.Tensor) -> str:
    def run() -> None:
        module.zero_grad()
        y = module(x)[0]
        y.backward(torch.ones_like(y))

    for _ in range(3):
        run()
    torch.cuda.synchronize()
    parts = " ".join(f"{name} {time:.2f}" for name, time in sorted(device_times(run).items()))
    return f"eager {timed(run):.2f}, graph {timed(replay_of(run)):.2f}; {parts}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="every fifth shape")
    arguments = parser.parse_args()
    rnnfast.cuda.enable(True)
    os.environ.setdefault("RNNFAST_CUDA_TIER", "first")
    failures = 0
    for cell, dtype, hidden, batch in shapes()[:: 5 if arguments.quick else 1]:
        torch.manual_seed(0)
        options = {"device": "cuda", "dtype": dtype}
        ours = getattr(rnnfast, cell)(hidden, hidden, **options)
        theirs = getattr(torch.nn, cell)(hidden, hidden, **options)
        x = torch.randn(STEPS, batch, hidden, **options, requires_grad=True)
        plans = [cuda_plans.plan(ours._config(), x, hidden, batch, back) for back in (False, True)]
        tiers = [p and f"{p.tier} {p.groups}x{p.blocks}, {p.rows} rows" for p in plans]
        print(f"{cell} {str(dtype)[6:]} H={hidden} B={batch}: {tiers[0]} / {tiers[1]}")
        for name, module in (("rnnfast", ours), ("cuDNN", theirs)):
            try:
                print(f"   {name}: {line_of(module, x)}")
            except RuntimeError as error:  # of a capture, for example; the other shapes may still run
                print(f"   {name}: {error}")
                failures += name == "rnnfast"
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
