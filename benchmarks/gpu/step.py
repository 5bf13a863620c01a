"""One training step of a layer on a GPU, for compute-sanitizer and ncu.

    python benchmarks/gpu/step.py [CELL H B] [--steps 4] [--packed]

``--packed`` is a packed batch with resets in a layer of two directions. The step fails unless the CUDA
kernels computed it, on the tier that RNNFAST_CUDA_TIER names.
"""

from __future__ import annotations

import argparse
import os
import warnings
from typing import Any

import torch

import rnnfast
from rnnfast.stack import cuda


def recorded() -> list[str]:
    """A list to which every launch of a kernel from now on adds its tier."""
    tiers: list[str] = []
    run = cuda._run

    def noting(plan: Any, *rest: Any) -> bool:
        tiers.append(plan.tier)
        return run(plan, *rest)

    cuda._run = noting
    return tiers


def train(arguments: argparse.Namespace, device: str) -> float:
    """The norm of the input's gradient after a step."""
    sizes = (int(arguments.shape[1]),) * 2
    batch, steps = int(arguments.shape[2]), arguments.steps
    options = {"device": device, "dtype": torch.bfloat16}
    kind = getattr(rnnfast, arguments.shape[0])
    module = kind(*sizes, bidirectional=arguments.packed, **options)
    x = torch.randn(steps, batch, sizes[0], **options, requires_grad=True)
    given, flags = x, {}
    if arguments.packed:
        lengths = torch.arange(batch) % steps + 1
        given = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
        flags = {"reset": torch.rand(steps, batch, device=device) < 0.3}
    y = module(given, **flags)[0]
    (y.data if arguments.packed else y).float().square().sum().backward()
    assert x.grad is not None
    return float(x.grad.float().norm())


def main(words: list[str] | None = None, device: str = "cuda") -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("shape", nargs="*", default=["LSTM", "40", "9"], metavar="CELL H B")
    parser.add_argument("--steps", type=int, default=4, help="a sanitizer takes seconds for each")
    parser.add_argument("--packed", action="store_true")
    arguments = parser.parse_args(words)
    warnings.simplefilter("error", RuntimeWarning)  # as of a device that refuses the kernels
    rnnfast.cuda.enable(True)
    tier = os.environ.setdefault("RNNFAST_CUDA_TIER", "first")
    tiers = recorded()
    norm = train(arguments, device)
    if len(tiers) != 2 or (tier != "first" and set(tiers) != {tier}):
        raise SystemExit(f"the launches were {tiers}; expected two on the tier {tier!r}")
    print(f"the norm of dx is {norm:.4g}; forward and backward ran on the tiers {tiers}")


if __name__ == "__main__":
    main()
