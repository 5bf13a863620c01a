"""Checks the CUDA kernels on a device against torch's operators in float64, beyond what the tests do.

    python benchmarks/gpu/check.py [--seconds 120] [--seed 0] [--emulated LIBRARY]

First long sequences and large batches, then every tier at the widest layer that it takes, then random
cases until the time is over. All memory that a kernel may read before writing is full of NaNs, and each
case runs twice and must give the same bits. Each case is printed before it runs, so the last line names
the case of a kernel that does not end. The last line has the worst error of each dtype. The exit status
is 1 after a failure, if no case ran, or if a long sequence or large batch has no plan. ``--emulated``
takes a library of tests/support/cuda_on_cpu.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import random
import sys
import time
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnnfast.stack import cuda, cuda_plans, cuda_switch, reference
from rnnfast.stack.config import CELLS, Inputs, StackConfig

#: The largest error that passes, as a part of the largest value. With weights of this size rounding
#: explains a third of it.
LIMITS = {"float64": 1e-11, "float32": 2e-5, "tf32": 6e-3, "float16": 8e-3, "bfloat16": 4e-2}
SOME_CELLS = ("lstm", "gru", "rnn_tanh", "gru_original")
WIDTHS = (1, 7, 8, 9, 33, 64, 100, 128, 129, 160, 200, 256, 257, 300, 512, 513, 640, 700, 1000, 1024)


class Case(NamedTuple):
    cell: str
    dtype: str  # a key of LIMITS
    T: int
    B: int
    H: int
    layers: int = 1
    directions: int = 1
    packed: bool = False
    reset: bool = False
    batch_first: bool = False
    tier: str = "first"

    @property
    def config(self) -> StackConfig:
        batch_first = self.batch_first and not self.packed
        return StackConfig(self.cell, self.layers, self.directions, batch_first=batch_first)


LARGE = [
    Case("lstm", "bfloat16", 2000, 3, 64),
    Case("gru", "bfloat16", 2000, 2, 256),
    Case("lstm", "bfloat16", 17, 256, 512),
    Case("gru", "tf32", 9, 128, 1024),
    Case("lstm", "bfloat16", 300, 128, 1024),
    Case("gru", "float32", 33, 64, 512),
    Case("lstm", "float16", 65, 1, 1024),
]


def dtype_of(name: str) -> torch.dtype:
    dtype = getattr(torch, "float32" if name == "tf32" else name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def inputs_of(case: Case, device: str) -> Inputs:
    generator = torch.Generator().manual_seed(zlib.crc32(str(case[:7]).encode()))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    rows, states = CELLS[case.cell].weight_blocks * case.H, case.layers * case.directions
    weights = []
    for number in range(states):
        width = case.H if number < case.directions else case.directions * case.H
        shapes = [(rows, width), (rows, case.H), (rows,), (rows,)]
        weights += [normal(*shape) * case.H**-0.5 / 2 for shape in shapes]
    sizes = None
    if case.packed:
        lengths = torch.randint(1, case.T + 1, (case.B,), generator=generator)
        lengths[0] = case.T
        sizes = torch.stack([(lengths > t).sum() for t in range(case.T)])
        x = normal(int(sizes.sum()), case.H)
    else:
        x = normal(*((case.B, case.T) if case.config.batch_first else (case.T, case.B)), case.H)
    h0 = normal(states, case.B, case.H) / 2
    c0 = normal(states, case.B, case.H) / 2 if CELLS[case.cell].has_c else None
    reset = (torch.rand(x.shape[:-1], generator=generator) < 0.2).to(device) if case.reset else None
    tensors = [None if t is None else t.to(device, dtype_of(case.dtype)) for t in (x, h0, c0, *weights)]
    assert tensors[0] is not None
    return Inputs(tensors[0], tensors[1], tensors[2], tensors[3:], sizes, reset)


def error_of(case: Case, device: str) -> tuple[float, bool] | None:
    """The largest relative error, and whether two runs gave the same bits; None without a plan."""
    os.environ["RNNFAST_CUDA_TIER"] = case.tier
    torch.backends.cudnn.allow_tf32 = case.dtype == "tf32"
    inputs = inputs_of(case, device)
    wanted = [t is not None for t in inputs.tensors]
    runs: list[list[Any]] = []
    grads: list[Any] = []
    for _ in range(2):
        out = cuda.forward(case.config, inputs, save=True)
        if out is None:
            return None
        assert out.saved is not None
        grads = grads or [None if t is None else torch.randn(t.shape).to(t) for t in out[:3]]
        found = cuda.backward(case.config, inputs, out.y, out.saved, [*grads, None], wanted)
        assert found is not None
        runs.append([*out[:3], *found])
    is_same = all(a is None or torch.equal(a, b) for a, b in zip(*runs, strict=True))
    worst = 0.0
    for value, true in zip(runs[0], truth(case.config, inputs, grads), strict=True):
        if true is not None and true.numel() > 0:
            error = (value.double() - true).abs().max() / true.abs().max().clamp_min(1e-30)
            worst = max(worst, float("inf") if error.isnan() else float(error))
    return worst, is_same


def truth(config: StackConfig, inputs: Inputs, grads: list[Any]) -> list[Any]:
    leaves = [None if t is None else t.double().requires_grad_() for t in inputs.tensors]
    out = reference.stack(config, inputs.with_tensors(leaves))
    pairs = [(t, g.double()) for t, g in zip(out[:3], grads, strict=True) if t is not None]
    there = [t for t in leaves if t is not None]
    found = iter(torch.autograd.grad([t for t, _ in pairs], there, [g for _, g in pairs]))
    outputs = [None if t is None else t.detach() for t in out[:3]]
    return [*outputs, *(None if t is None else next(found) for t in leaves)]


def boundaries() -> Iterator[Case]:
    """Around the widest layer of each tier."""
    for cell, dtype in itertools.product(SOME_CELLS, LIMITS):
        torch.backends.cudnn.allow_tf32 = dtype == "tf32"
        widest = cuda_plans.widest_of_each_tier(0, cell, dtype_of(dtype), 8)
        for hidden in widest.values():
            yield from (Case(cell, dtype, 3, 9, h) for h in (hidden - 7, hidden, hidden + 1))


def chance(chooser: random.Random) -> Case:
    case = Case(
        chooser.choice(SOME_CELLS),
        chooser.choice(list(LIMITS)),
        T=chooser.choice((1, 2, 5, 17, 64)),
        B=chooser.choice((1, 2, 7, 8, 9, 31, 64, 129, 256)),
        H=chooser.choice(WIDTHS),
    )
    return case._replace(
        layers=chooser.choice((1, 1, 2)),
        directions=chooser.choice((1, 1, 2)),
        packed=chooser.random() < 0.3,
        reset=chooser.random() < 0.3,
        batch_first=chooser.random() < 0.3,
        tier=chooser.choice(("first", "first", "block", "cluster", "grid")),
    )


def cases(seed: int, is_emulated: bool) -> Iterator[Case]:
    chooser = random.Random(seed)
    if not is_emulated:
        yield from LARGE
        yield from boundaries()
    while True:
        case = chance(chooser)
        if is_emulated:  # an emulated thread is slow
            case = case._replace(T=min(case.T, 3), B=min(case.B, 9), H=min(case.H, 40))
        yield case


def use_emulated(library: str) -> None:
    spec = importlib.util.spec_from_file_location("_cuda", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cuda_plans._cuda = module


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--emulated", metavar="LIBRARY")
    arguments = parser.parse_args()
    device = "cuda"
    if arguments.emulated:
        use_emulated(arguments.emulated)
        device = "cpu"
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)  # this also fills torch.empty with NaNs
    cuda_switch.set_mode(True)
    worst: dict[str, float] = {}
    count = without_plan = failures = 0
    end = time.time() + arguments.seconds
    for case in cases(arguments.seed, bool(arguments.emulated)):
        if time.time() > end:
            break
        print(f"{case}: ", end="", flush=True)
        try:
            found = error_of(case, device)
        except RuntimeError as error:  # after an error of the device, no later case can run
            print(error)
            failures += 1
            break
        if found is None:
            without_plan += 1
            failures += case in LARGE
            print("WRONG: no plan" if case in LARGE else "no plan")
            continue
        if case.H < 8 and case.dtype not in ("float32", "float64"):
            print("not judged")  # sums of few terms cancel, and rounding alone exceeds the limit
            continue
        count += 1
        error, is_same = found
        worst[case.dtype] = max(worst.get(case.dtype, 0.0), error)
        is_right = error < LIMITS[case.dtype] and is_same
        failures += not is_right
        print(f"{'' if is_right else 'WRONG: '}error {error:.2e}{'' if is_same else ', other bits'}")
    errors = ", ".join(f"{dtype} {error:.1e}" for dtype, error in sorted(worst.items()))
    print(f"{count} cases, {failures} wrong, {without_plan} without a plan; worst errors: {errors}")
    return int(failures > 0 or count == 0)


if __name__ == "__main__":
    sys.exit(main())
