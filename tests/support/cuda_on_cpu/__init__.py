"""The CUDA extension compiled for the CPU, with emulator.h in the place of a device."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[3]
NUMBERS = ("bfloat16", "float16", "float32", "float64", "tfloat32")
SOURCES = [ROOT / f"csrc/cuda/{name}.cu" for name in NUMBERS]
SOURCES += [
    ROOT / f"csrc/{name}.cpp" for name in ("cuda/bindings", "cuda/plan", "python/tensor", "core/view")
]


def build(folder: Path, *flags: str) -> Path:
    """Compile it, in a few seconds of each core; skips the test where that cannot be done."""
    compiler = shutil.which("c++") or shutil.which("g++")
    pybind11 = pytest.importorskip("pybind11", reason="the emulated device needs pybind11 to be built")
    if compiler is None or not SOURCES[0].is_file():
        pytest.skip("the emulated device needs a C++ compiler and the source tree")
    folder.mkdir(parents=True, exist_ok=True)
    includes = [pybind11.get_include(), sysconfig.get_path("include")]
    common = [
        *(compiler, "-std=c++20", "-O1", "-g", "-fPIC", "-fvisibility=hidden", "-DRNNFAST_EMULATED"),
        *("-Wno-unknown-pragmas", *flags, f"-I{ROOT}/csrc", f"-I{ROOT}/tests/support/cuda_on_cpu"),
        *(f"-isystem{path}" for path in includes),
    ]

    def compile(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        subprocess.run([*common, "-x", "c++", "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile, SOURCES))
    library = folder / "_cuda.so"
    subprocess.run([compiler, "-shared", *flags, *objects, "-o", library], check=True)
    return library


def load(library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_cuda", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
