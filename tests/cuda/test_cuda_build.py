"""When CUDA kernels are built, that they compile for every architecture, and hold all in registers."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from reference import CELLS

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


@pytest.fixture(params=CMAKES or ["none"])
def version(request):
    """The version of a CMake: a test runs with each."""
    if request.param not in CMAKES:
        pytest.skip("no cmake")
    return request.param


@pytest.fixture
def cmake(version):
    return CMAKES[version]


def configure(
    folder: Path, *definitions: str, cmake: str | None = CMAKE, **environment: str
) -> subprocess.CompletedProcess:
    import pybind11

    cleared = {"CUDACXX": "", "CUDA_PATH": ""}
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


@pytest.mark.slow
def test_kernels_spill_nothing(built):
    """Each cell, forward and backward, with five kinds of numbers, on two architectures."""
    _, said = built
    names = re.findall(r"Compiling entry function '(\w+)' for '(sm_\d+)'", said)
    assert len(names) == len(set(names)) == len(CELLS) * 2 * 5 * 2
    assert {architecture for _, architecture in names} == {"sm_80", "sm_90"}
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", said)]
    assert len(registers) == len(names)
    assert max(registers) <= 255
    frames = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said
    )
    assert len(frames) == len(names)
    assert set(frames) == {("0", "0", "0")}


@pytest.mark.slow
def test_module_loads_where_there_is_no_device(built, python):
    """Its runtime is inside, and neither libtorch nor cuDNN is linked."""
    library, _ = built
    load = f"import cuda_on_cpu; m = cuda_on_cpu.load({str(library)!r}); "
    ask = load + "m.plan(0, -1, 'float32', False, False, (8, 2, 1), None)"
    assert "not in the table of 6 cells" in python(ask, check=False).stderr
    needed = subprocess.run(["objdump", "-p", library], check=True, capture_output=True, text=True)
    linked = re.findall(r"NEEDED +(\S+)", needed.stdout)
    assert linked
    assert not [n for n in linked if re.match(r"lib(torch|c10|cuda|cudnn|cublas)", n)]
    if not Path("/dev/nvidiactl").exists():
        refused = python(load + "m.device(0)", check=False)
        assert refused.returncode == 1
        assert "RefusedError: asking for the properties of the device" in refused.stderr


# Programs in the place of nvcc, what AUTO and ON say of each, and of none.
BROKEN = {
    "fails": ("exit 1", "`{nvcc} --version` fails: exit status 1"),
    "fails with a reason": (
        "echo 'nvcc: error while loading shared libraries: libc.so.9' >&2; exit 127",
        "`{nvcc} --version` fails: nvcc: error while loading shared libraries: libc.so.9",
    ),
    "is another program": ("echo g++ 12.2.0", "{nvcc} is not nvcc: g++ 12.2.0"),
    "is too old": (
        "echo 'Cuda compilation tools, release 10.2, V10.2.89'",
        "{nvcc} is nvcc 10.2.89, older than 12.0",
    ),
    "compiles nothing": (
        """case "$*" in *--version*)
          echo 'nvcc: NVIDIA (R) Cuda compiler driver'
          echo 'Cuda compilation tools, release 12.4, V12.4.131'
          exit
        esac
        echo 'host_config.h:143:2: error: #error -- unsupported GNU version!' >&2
        exit 2""",
        "nvcc 12.4.131 ({nvcc}) fails with CMake {version}: "
        "host_config.h:143:2: error: #error -- unsupported GNU version!",
    ),
}


@pytest.fixture(params=[*BROKEN, "is not there"])
def broken(request, tmp_path, version):
    """PATH with such an nvcc first, and what is said of it."""
    folder = tmp_path / "toolkit" / "bin"
    folder.mkdir(parents=True)
    (tmp_path / "toolkit" / "nvvm" / "libdevice").mkdir(parents=True)  # CMake looks for it
    if request.param not in BROKEN:
        for name in ("c++", "cc", "g++", "gcc", "ld", "as", "ar", "ranlib", "make", "ninja"):
            if found := shutil.which(name):
                (folder / name).symlink_to(found)
        return str(folder), "there is no nvcc on PATH"
    script, said = BROKEN[request.param]
    nvcc = folder / "nvcc"
    nvcc.write_text(f"#!/bin/sh\n{script}\n")
    nvcc.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}", said.format(nvcc=nvcc, version=version)


@pytest.mark.parametrize("definitions", [[], ["-DRNNFAST_CUDA=OFF"]], ids=["default", "off"])
def test_no_cuda_compiler_is_called_unless_asked_for(definitions, cmake, tmp_path):
    called = tmp_path / "called"
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\ntouch {called}\nexit 1\n")
    nvcc.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    off = configure(
        tmp_path / "off", *definitions, cmake=cmake, PATH=path, CUDACXX=str(nvcc), CUDA_PATH="/none"
    )
    assert off.returncode == 0, off.stdout + off.stderr
    assert not called.exists()
    assert "CUDA" not in off.stdout + off.stderr


def test_without_cuda_auto_goes_on_and_on_is_an_error(broken, cmake, version, tmp_path):
    path, problem = broken
    auto = configure(tmp_path, "-DRNNFAST_CUDA=AUTO", cmake=cmake, PATH=path)
    assert auto.returncode == 0, auto.stdout + auto.stderr
    said = [line for line in (auto.stdout + auto.stderr).splitlines() if re.search("CUDA|nvcc", line)]
    assert said == [f"-- RNNFAST_CUDA is AUTO, and the CUDA kernels are left out: {problem}"]
    commands = compile_commands(tmp_path)

    on = configure(tmp_path, "-DRNNFAST_CUDA=ON", cmake=cmake, PATH=path)
    assert on.returncode != 0
    said = "".join(on.stderr.split())  # CMake breaks lines, within a path too
    assert "".join(f"RNNFAST_CUDA is ON, but {problem}".split()) in said
    assert f"neednvcc12.0orlaterandCMake3.20orlater(thisisCMake{version})" in said, on.stderr

    off = configure(tmp_path, "-DRNNFAST_CUDA=OFF", cmake=cmake, PATH=path)
    assert off.returncode == 0, off.stdout + off.stderr
    assert commands
    assert compile_commands(tmp_path) == commands


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc to compile with")
def test_auto_finds_this_machines_compiler(cmake, tmp_path):
    """By whatever CMake: those before 3.26 know no C++20 in CUDA themselves."""
    auto = configure(tmp_path, "-DRNNFAST_CUDA=AUTO", cmake=cmake)
    assert auto.returncode == 0, auto.stdout + auto.stderr
    sources = [command for command in compile_commands(tmp_path) if re.search(r"\.cu\b", command)]
    assert len(sources) == 5, auto.stdout
    for command in sources:
        assert re.findall(r"-std=\S+", command) == ["-std=c++20"]


def test_other_settings_are_errors(cmake, tmp_path):
    maybe = configure(tmp_path, "-DRNNFAST_CUDA=MAYBE", cmake=cmake)
    assert maybe.returncode != 0
    assert "RNNFAST_CUDA is MAYBE; expected OFF, ON or AUTO" in maybe.stderr
