"""The program of cuda_on_cpu/races.cpp: kernels on the emulated device, under the thread sanitizer."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

from cuda_on_cpu import ROOT

SUPPORT = ROOT / "tests/support/cuda_on_cpu"
HEADERS = [ROOT / "csrc", SUPPORT]
FOUND = 66  # the program's exit status where there is a race


class Edit(NamedTuple):
    """Text `before`, which a header has once, is replaced."""

    file: str
    before: str
    after: str


# A launch takes less time with fewer threads than a device's blocks have.
FEWER_THREADS = Edit("cuda/plan.h", "block_threads = 256", "block_threads = 64")


def barriers(file: str) -> list[Edit]:
    """For each line of a header that is a barrier: the edit that leaves it out."""
    (path,) = (folder / file for folder in HEADERS if (folder / file).is_file())
    lines = path.read_text().splitlines(keepends=True)
    edits = []
    for i, line in enumerate(lines):
        if re.match(r" +(sync_block|sync_cluster|group_\.sync)\(\);", line):
            # With enough lines around that the text is there once.
            before, after = "".join(lines[i - 3 : i]), "".join(lines[i + 1 : i + 4])
            edits.append(Edit(file, before + line + after, before + "      ;\n" + after))
    return edits


def edited(folder: Path, edits: list[Edit]) -> Path:
    """A folder with the edited headers, to be searched before all others."""
    for file, before, after in edits:
        (original,) = (path / file for path in HEADERS if (path / file).is_file())
        text = original.read_text()
        assert text.count(before) == 1, f"{file} has {text.count(before)} times: {before}"
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(text.replace(before, after))
    return folder


def build(compiler: str, folder: Path, numbers: str, cells: str, *edits: Edit) -> Path:
    """The program for some cells, and for a number type and its engine of product.h."""
    number, engine = numbers.split()
    headers = [edited(folder, [FEWER_THREADS, *edits]), *HEADERS]
    program = folder / "races"
    subprocess.run(
        [
            *(compiler, "-std=c++20", "-fsanitize=thread", "-O1", "-g1", "-Wno-unknown-pragmas"),
            *("-DRNNFAST_EMULATED", f"-DRNNFAST_NUMBER={number}", f"-DRNNFAST_ENGINE={engine}"),
            f"-DRNNFAST_CELLS={cells}",
            *(f"-I{header}" for header in headers),
            *(SUPPORT / "races.cpp", "-o", program),
        ],
        check=True,
    )
    return program


def run(program: Path, *only: str, **options: int) -> subprocess.CompletedProcess[str]:
    told = " ".join(f"{name}={value}" for name, value in {"exitcode": FOUND, **options}.items())
    environment = os.environ | {"TSAN_OPTIONS": told}
    return subprocess.run([program, *only], env=environment, capture_output=True, text=True)
