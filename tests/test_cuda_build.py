"""The CUDA wing compiles for every architecture, and its kernels keep all they hold in registers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CMAKE = shutil.which(
    "cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
)
needs_cmake = pytest.mark.skipif(CMAKE is None, reason="no cmake")


def configure(folder: Path, *definitions: str, **environment: str) -> subprocess.CompletedProcess:
    import pybind11

    return subprocess.run(
        [
            *(CMAKE, "-S", ROOT, "-B", folder, f"-DPython_EXECUTABLE={sys.executable}"),
            *(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", *definitions),
        ],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The module _cuda from the real sources, and what the compiler said of its kernels."""
    if CMAKE is None or shutil.which("nvcc") is None:
        pytest.skip("no nvcc to compile with")
    folder = tmp_path_factory.mktemp("cuda")
    architectures = "-DCMAKE_CUDA_ARCHITECTURES=80-real;90-real"
    found = configure(folder, "-DRNNFAST_CUDA=ON", architectures, "-DCMAKE_CUDA_FLAGS=-Xptxas -v")
    assert found.returncode == 0, found.stdout + found.stderr
    command = [CMAKE, "--build", folder, "--target", "_cuda", "--parallel", "2"]
    build = subprocess.run(command, capture_output=True, text=True)
    assert build.returncode == 0, build.stdout + build.stderr
    (library,) = folder.glob("_cuda.*.so")
    return library, build.stdout + build.stderr


def test_kernels_spill_nothing(built):
    """Each of five cells, forward and backward, with five kinds of numbers, on two architectures."""
    _, said = built
    names = re.findall(r"Compiling entry function '(\w+)' for '(sm_\d+)'", said)
    assert len(names) == len(set(names)) == 5 * 2 * 5 * 2
    assert {architecture for _, architecture in names} == {"sm_80", "sm_90"}
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", said)]
    assert len(registers) == len(names)
    assert max(registers) <= 255
    frames = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said
    )
    assert len(frames) == len(names)
    assert set(frames) == {("0", "0", "0")}


def test_module_loads_where_there_is_no_device(built, python):
    """Its runtime is inside, and neither libtorch nor cuDNN is linked."""
    library, _ = built
    load = f"import cuda_on_cpu; m = cuda_on_cpu.load({str(library)!r}); "
    assert python(load + "print(m.cell(2))").stdout.startswith("(4, True, (0, 1, 2, 3)")
    needed = subprocess.run(["objdump", "-p", library], check=True, capture_output=True, text=True)
    linked = re.findall(r"NEEDED +(\S+)", needed.stdout)
    assert linked
    assert not [n for n in linked if re.match(r"lib(torch|c10|cuda|cudnn|cublas)", n)]
    if not Path("/dev/nvidiactl").exists():
        refused = python(load + "m.device(0)", check=False)
        assert refused.returncode == 1
        assert "RuntimeError: rnnfast: asking about CUDA device 0 failed" in refused.stderr


@needs_cmake
def test_cuda_without_a_compiler_is_an_error(tmp_path):
    empty = tmp_path / "bin"
    empty.mkdir()
    for name in ("c++", "cc", "g++", "gcc", "ld", "as", "ar", "ranlib", "make", "ninja"):
        if found := shutil.which(name):
            (empty / name).symlink_to(found)
    environment = {"PATH": str(empty), "CUDACXX": "", "CUDA_PATH": ""}
    on = configure(
        tmp_path / "on", "-DRNNFAST_CUDA=ON", "-DCMAKE_CUDA_COMPILER=NOTFOUND", **environment
    )
    assert on.returncode != 0
    assert "RNNFAST_CUDA is ON, but no CUDA compiler was found" in " ".join(on.stderr.split())


@needs_cmake
def test_other_settings_are_errors(tmp_path):
    maybe = configure(tmp_path, "-DRNNFAST_CUDA=MAYBE")
    assert maybe.returncode != 0
    assert "RNNFAST_CUDA is MAYBE; expected AUTO, ON or OFF" in maybe.stderr
