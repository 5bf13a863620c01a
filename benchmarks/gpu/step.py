"""One training step of a layer on a GPU, for compute-sanitizer and ncu.

python benchmarks/gpu/step.py [CELL H B]
"""

from __future__ import annotations

import os
import sys

import torch

import rnnfast


def main() -> None:
    cell, hidden, batch = (sys.argv[1], *map(int, sys.argv[2:4])) if sys.argv[3:] else ("LSTM", 40, 9)
    steps = 64 if sys.argv[3:] else 4  # a sanitizer takes seconds for each step
    rnnfast.cuda.enable(True)
    os.environ.setdefault("RNNFAST_CUDA_TIER", "first")
    options = {"device": "cuda", "dtype": torch.bfloat16}
    module = getattr(rnnfast, cell)(hidden, hidden, **options)
    x = torch.randn(steps, batch, hidden, **options, requires_grad=True)
    module(x)[0].float().square().sum().backward()
    torch.cuda.synchronize()
    assert x.grad is not None
    print(f"the norm of dx is {float(x.grad.float().norm()):.4g}")


if __name__ == "__main__":
    main()
