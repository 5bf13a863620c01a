"""The project configured by every CMake of this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def all_cmakes() -> dict[str, str]:
    """The CMakes that run here by their versions: this environment's first, then those on PATH."""
    found: dict[str, str] = {}
    for folder in (str(Path(sys.executable).parent), *os.environ["PATH"].split(os.pathsep)):
        if path := shutil.which("cmake", path=folder):
            said = subprocess.run([path, "--version"], capture_output=True, text=True)
            if said.returncode == 0:
                found.setdefault(said.stdout.split()[2], path)
    return found


CMAKES = all_cmakes()
CMAKE = next(iter(CMAKES.values()), None)


def configure(
    folder: Path, *definitions: str, cmake: str | None = CMAKE, **environment: str
) -> subprocess.CompletedProcess[str]:
    import pybind11

    assert cmake is not None
    cleared = dict.fromkeys(("CUDACXX", "CUDA_PATH", "CMAKE_CXX_COMPILER_LAUNCHER"), "")
    return subprocess.run(
        [
            *(cmake, "-S", ROOT, "-B", folder, f"-DPython_EXECUTABLE={sys.executable}"),
            *(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", *definitions),
            "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON",
        ],
        env=os.environ | cleared | environment,
        capture_output=True,
        text=True,
    )


def compile_commands(folder: Path) -> list[str]:
    """What a configured build would run, without the names of its folders."""
    text = (folder / "compile_commands.json").read_text().replace(str(folder), "")
    return [entry["command"] for entry in json.loads(text)]
