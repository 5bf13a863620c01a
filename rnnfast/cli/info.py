"""rnnfast info: the installed versions, the build, and the machine."""

from __future__ import annotations

import argparse
import os
import platform
import warnings
from collections.abc import Mapping

import numpy

import rnnfast
from rnnfast._native import _C


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(args: argparse.Namespace) -> int:
    show(facts())
    if len(openmp_runtimes()) > 1:
        print(
            "This process has several OpenMP runtimes, which compete for its cores. Import torch "
            "before the library with the other runtime, or install both from one source."
        )
    return 0


def show(rows: Mapping[str, str]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:  # a bug report must not depend on the extra [demo]
        print("\n".join(f"{name:24}{value}" for name, value in rows.items()))
        return
    table = Table(show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    Console(highlight=False).print(table, markup=False)


def facts() -> Mapping[str, str]:
    """The facts about software and machine for a measurement or a bug report."""
    build = _C.build_info()
    forced = os.environ.get("RNNFAST_ISA")
    rows = {
        "rnnfast": rnnfast.__version__,
        "compiler": text(build.get("compiler", "unknown")),
        "flags": text(build.get("flags", "")),
        "instruction sets built": text(build.get("isas", "unknown")),
        "usable here": text(_C.supported_isas()),
        "chosen": _C.isa() + (f" (RNNFAST_ISA={forced})" if forced else ""),
        "CPU": cpu_model(),
        "cores": f"{usable_cores()} usable",
        "threads": f"{_C.max_threads()} by default",
        "OpenMP": text(build.get("openmp", "unknown")),
        "OpenMP runtimes mapped": "\n".join(openmp_runtimes()) or "unknown without threadpoolctl",
        "torch": torch_version(),
        "CUDA": cuda_state(),
        "numpy": numpy.__version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": platform.platform(),
    }
    return {name: value for name, value in rows.items() if value}


def text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def torch_version() -> str:
    try:
        import torch
    except ImportError:
        return 'not installed: pip install "rnnfast[torch]" for rnnfast.LSTM and the others'
    return f"{torch.__version__}, {torch.get_num_threads()} threads"


def cuda_state() -> str:
    """The switch of the CUDA kernels, and for each device what they take."""
    from rnnfast import _native

    if _native.cuda_error is not None:
        return f"built, but cannot be loaded: {_native.cuda_error}"
    if _native._cuda is None:
        return "not built (cmake.define.RNNFAST_CUDA=ON builds the kernels)"
    try:
        import torch
    except ImportError:
        return "built; no layer uses it without torch"

    lines = cuda_switch_lines()
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for number in range(devices):
        lines += cuda_device_lines(number)
    return "\n".join(lines if devices else [*lines, "no device"])


def cuda_switch_lines() -> list[str]:
    from rnnfast.stack import cuda_switch

    try:
        mode, tier = cuda_switch.mode(), cuda_switch.forced_tier()
    except ValueError as error:
        return [f"built; {error}"]
    takes = {
        True: "layers that fit the device",
        False: "no layer",
        "auto": "layers that were measured to win",
    }
    setting = os.environ.get("RNNFAST_CUDA")
    source = f"RNNFAST_CUDA={setting}" if setting else "the default"
    lines = [f"built; mode {mode} ({source}): {takes[mode]}"]
    return lines if tier is None else [*lines, f"tier: {tier} (RNNFAST_CUDA_TIER)"]


def cuda_device_lines(number: int) -> list[str]:
    """A device, its measurements, and its widest layers of each tier for 32 rows and one direction."""
    with warnings.catch_warnings(record=True) as refusals:
        warnings.simplefilter("always")
        lines = _cuda_device_lines(number)
    return lines + [f"   {refusal.message}" for refusal in refusals]


def _cuda_device_lines(number: int) -> list[str]:
    import torch

    from rnnfast.stack import cuda_measured, cuda_plans

    capability = cuda_plans.capability(number)
    lines = [f"{number}: {torch.cuda.get_device_name(number)}, compute capability {capability}"]
    kind = cuda_plans.measured_as(number)
    cases = cuda_measured.counts(kind)
    lines.append(
        f"   auto: the kernels win in {cases[0]} of {cases[1]} measured cases"
        if cases[1]
        else f"   auto: no layer, since no device of compute capability {kind} was measured"
    )
    for cell in ("lstm", "gru"):
        for dtype in ("bfloat16", "float32"):
            widest = cuda_plans.widest_of_each_tier(number, cell, getattr(torch, dtype), rows=32)
            tiers = ", ".join(f"{tier} to H={width}" for tier, width in widest.items())
            lines.append(f"   {cell} {dtype}: {tiers or 'no tier'}; wider: as torch.nn")
    return lines


def usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_model() -> str:
    try:
        import cpuinfo
    except ImportError:
        return platform.processor() or platform.machine()
    cpu = cpuinfo.get_cpu_info()
    kind = [f"{key} {cpu[key]}" for key in ("family", "model") if key in cpu]
    return str(cpu.get("brand_raw", platform.machine())) + (f" ({', '.join(kind)})" if kind else "")


def openmp_runtimes() -> list[str]:
    """Paths of the OpenMP runtimes in this process; empty without threadpoolctl."""
    try:
        import threadpoolctl
    except ImportError:
        return []
    pools = threadpoolctl.threadpool_info()
    return sorted({pool["filepath"] for pool in pools if pool["user_api"] == "openmp"})
