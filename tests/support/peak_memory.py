"""How much memory training steps need: `peak` asks a fresh process, which runs this file."""

from __future__ import annotations

import os
import subprocess
import sys


def peak(package, cell, steps, batch, size, dtype="float32", isa=""):
    """KiB beyond what a first small step needs, with I = H = size and two threads."""
    command = [sys.executable, __file__, package, cell, *map(str, (steps, batch, size)), dtype, isa]
    # Large blocks go back to the system at once; what glibc keeps of them otherwise is luck.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144"}
    return int(subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout)


def read(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key))


def main(package, cell, steps, batch, size, dtype, isa):
    import torch

    import rnnfast
    from rnnfast import _C

    _C.force_isa(isa)
    torch.set_num_threads(2)
    dtype = getattr(torch, dtype)
    module = getattr({"rnnfast": rnnfast, "torch": torch.nn}[package], cell)(size, size, dtype=dtype)

    def step(steps, batch):
        x = torch.randn(steps, batch, size, dtype=dtype, requires_grad=True)
        module(x)[0].sum().backward()
        module.zero_grad()

    step(2, 1)  # what is loaded once
    before = read("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    for _ in range(3):
        step(steps, batch)
    print(read("VmHWM") - before)


if __name__ == "__main__":
    package, cell, *sizes, dtype, isa = sys.argv[1:]
    main(package, cell, *map(int, sizes), dtype, isa)
