"""The machine code of the kernels in a built module _cuda: what a device executes.

`python tests/support/cuda_code.py LIBRARY` records the numbers of instructions in tests/cuda/code.json,
with the release of the nvcc on PATH. To be run after a change of the kernels that may have its price.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import sass
from rnnfast.stack.cell_table import CELLS

RECORDED = Path(__file__).parents[1] / "cuda/code.json"
# Cells by the names of their C++ classes.
CLASSES = {"".join(part.title() for part in name.split("_")): cell for name, cell in CELLS.items()}
# A kernel's name, as `void forward_kernel<Lstm, Bfloat16, TensorCores<Bfloat16>>`, is mangled.
NAME = re.compile(
    r"(?P<kernel>forward|backward)_kernelINS0_\d+(?P<cell>\w+?)E"
    r"(?:NS_\d+)?(?P<number>Bfloat16|Float16|[fd])E?NS0_\d+(?P<engine>Scalars|TensorCores)I"
)
# The .cu files, by number and engine.
NUMBERS = {
    ("Bfloat16", "TensorCores"): "bfloat16",
    ("Float16", "TensorCores"): "float16",
    ("f", "Scalars"): "float32",
    ("d", "Scalars"): "float64",
    ("f", "TensorCores"): "tfloat32",
}


class Id(NamedTuple):
    architecture: str  # such as sm_90
    numbers: str  # the .cu file
    cell: str  # its C++ class
    kernel: str  # forward or backward


class Code(NamedTuple):
    """What the tests ask of a kernel's code. The time loop is the loop of all steps."""

    step: int  # instructions of the time loop
    element: int  # of its loops over rows and units, which apply the formula
    pair: int | None  # of a warp from one pair of HMMA to the next pair of the same sum; None: no HMMA
    local: int  # loads and stores of memory in the place of registers
    multiplies: int  # HMMA
    unsynced: int  # HMMA with no WARPSYNC before it in its straight line of instructions
    fences: tuple[int, int, int]  # MEMBAR outside of loops, in the time loop, and in loops inside of it


def tool(name: str) -> str | None:
    """Cuobjdump or nvdisasm: of the Python package, or on PATH."""
    try:
        for file in importlib.metadata.files(f"nvidia-cuda-{name}") or []:
            if file.name == name:
                return str(file.locate())
    except importlib.metadata.PackageNotFoundError:
        pass
    return shutil.which(name)


def release() -> str:
    """The release of nvcc, such as 13.0."""
    said = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    (found,) = re.findall(r"release (\d+\.\d+)", said)
    return found


def printed(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def architectures(library: Path, kind: str) -> set[str]:
    """Of the machine code ("elf") or the PTX ("ptx") in a library."""
    listed = printed(str(tool("cuobjdump")), f"-l{kind}", library)
    return set(re.findall(r"\.(sm_\d+)\.", listed))


def code(library: Path) -> Iterator[tuple[Id, Code]]:
    """Of every kernel in a library."""
    with tempfile.TemporaryDirectory() as folder:
        extract = [str(tool("cuobjdump")), "-xelf", "all", str(library.absolute())]
        subprocess.run(extract, check=True, cwd=folder, capture_output=True)
        for path in sorted(Path(folder).glob("*.cubin")):
            architecture = path.name.split(".")[-2]
            for kernel in sass.kernels(printed(str(tool("nvdisasm")), "-c", path)):
                name = NAME.search(kernel.name)
                assert name is not None, kernel.name
                numbers = NUMBERS[name["number"], name["engine"]]
                yield Id(architecture, numbers, name["cell"], name["kernel"]), measure(kernel)


def measure(kernel: sass.Kernel) -> Code:
    loops = kernel.loops
    (steps,) = [
        loop
        for loop in loops
        if kernel.find("BAR", within=loop) and not any(loop < other for other in loops)
    ]
    fences = [0, 0, 0]
    for i in kernel.find("MEMBAR"):
        around = [loop for loop in loops if i in loop]
        fences[0 if not around else 1 if around == [steps] else 2] += 1
    multiplies = kernel.find("HMMA")
    return Code(
        step=len(steps),
        element=sum(len(loop) for loop in element_loops(kernel, steps)),
        pair=pair(kernel, steps),
        local=len(kernel.find("LDL", "STL")),
        multiplies=len(multiplies),
        unsynced=sum(not synced(kernel, i) for i in multiplies),
        fences=(fences[0], fences[1], fences[2]),
    )


def element_loops(kernel: sass.Kernel, steps: frozenset[int]) -> list[frozenset[int]]:
    """The loops that read the products or gates of a step, or write its results.

    Exchanges use generic addresses, or loads that are not from this multiprocessor's cache.
    """
    found = []
    for loop in kernel.loops:
        memory = kernel.find("LDG", "STG", within=loop)
        if (
            loop < steps
            and any("STRONG" not in kernel.code[i].opcode for i in memory)
            and not kernel.find("BAR", "HMMA", "MEMBAR", within=loop)
            and not any(loop < other for other in found)
        ):
            found.append(loop)
    return found


def pair(kernel: sass.Kernel, steps: frozenset[int]) -> int | None:
    multiplies = kernel.find("HMMA", within=steps)
    if not multiplies:
        return None
    firsts = set(multiplies[::2])
    return statistics.median_low(
        kernel.distance(i, firsts, steps) or sys.maxsize for i in multiplies[1::2]
    )


def synced(kernel: sass.Kernel, i: int) -> bool:
    (line,) = [block for block in kernel.blocks if i in block]
    return bool(kernel.find("WARPSYNC", within=range(line.start, i)))


def recorded() -> tuple[str, dict[Id, list[int | None]]]:
    """The release of nvcc, and step, element and pair of each kernel."""
    kept = json.loads(RECORDED.read_text())
    return kept["nvcc"], {Id(*name.split()): numbers for name, numbers in kept["kernels"].items()}


def record(library: Path) -> None:
    lines = [
        f"    {json.dumps(' '.join(name))}: {json.dumps([found.step, found.element, found.pair])}"
        for name, found in sorted(code(library))
    ]
    text = ",\n".join(lines)
    RECORDED.write_text(f'{{\n  "nvcc": "{release()}",\n  "kernels": {{\n{text}\n  }}\n}}\n')


if __name__ == "__main__":
    record(Path(sys.argv[1]))
