"""The CUDA extension compiled for the CPU, with emulator.h in the place of a device."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

from rnnfast.stack import cuda_plans, cuda_switch

ROOT = Path(__file__).parents[3]
NUMBERS = ("bfloat16", "float16", "float32", "float64", "tfloat32")
SOURCES = [ROOT / f"csrc/cuda/{name}.cu" for name in NUMBERS]
SOURCES += [
    ROOT / f"csrc/{name}.cpp" for name in ("cuda/bindings", "cuda/plan", "python/tensor", "core/view")
]
SOURCES.append(ROOT / "tests/support/cuda_on_cpu/runtime.cpp")


def digest() -> str:
    """A number of all sources: another one means another build."""
    folders = (ROOT / "csrc", ROOT / "tests/support/cuda_on_cpu")
    files = sorted(f for folder in folders for f in folder.rglob("*.*") if f.suffix != ".pyc")
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:12]


def build(folder: Path, *flags: str) -> Path:
    """Compile it, in a few seconds of each core; skips the test where that cannot be done."""
    compiler = shutil.which("c++") or shutil.which("g++")
    pybind11 = pytest.importorskip("pybind11", reason="the emulated device needs pybind11 to be built")
    if compiler is None or not SOURCES[0].is_file():
        pytest.skip("the emulated device needs a C++ compiler and the source tree")
    folder.mkdir(parents=True, exist_ok=True)
    includes = [pybind11.get_include(), sysconfig.get_path("include")]
    common = [
        *(compiler, "-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-DRNNFAST_EMULATED"),
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


def load(library: Path, package: str = "") -> ModuleType:
    """The module in a library. A copy of a library is another module in another ``package``."""
    spec = importlib.util.spec_from_file_location(f"{package}._cuda" if package else "_cuda", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fresh(extension: ModuleType, folder: Path) -> ModuleType:
    """A copy of the extension, with which nothing has been done yet."""
    assert extension.__file__ is not None
    library = Path(shutil.copy(extension.__file__, folder))
    return load(library, f"copy_{hashlib.sha256(bytes(library)).hexdigest()[:12]}")


def use(extension: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the CUDA wing run every layer that fits on ``extension``, until the test ends."""
    monkeypatch.setattr(cuda_plans, "_cuda", extension)
    monkeypatch.setattr(cuda_plans, "PLANS", cuda_plans.Plans())
    monkeypatch.setattr(cuda_switch, "_mode", True)
    monkeypatch.setenv("RNNFAST_CUDA_TIER", "first")


class Runtime:
    """The runtime of an emulated device: what it was asked, and what it shall answer."""

    def __init__(self, extension: ModuleType) -> None:
        self._library = ctypes.CDLL(extension.__file__)
        self._library.emulated_calls.restype = ctypes.c_char_p
        self._library.emulated_reset()

    def choose(self, **values: int) -> None:
        """Set properties of the device (``clusters_of_16=7``), or the error of a function."""
        for name, value in values.items():
            name = name if name.startswith("cuda") else name.replace("_", " ")
            self._library.emulated_choose(name.encode(), value)

    def calls(self, function: str = "") -> list[str]:
        """The calls of a function so far, or of all functions, as text."""
        lines = self._library.emulated_calls().decode().splitlines()
        return [line for line in lines if line.startswith(function)]

    @property
    def last_error(self) -> int:
        return int(self._library.emulated_last_error())

    def reset(self) -> None:
        self._library.emulated_reset()
