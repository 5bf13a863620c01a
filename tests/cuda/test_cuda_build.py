"""When CUDA kernels are built, by which compiler, and for which devices."""

from __future__ import annotations

import os
import re
import shutil

import pytest

from cmakes import CMAKES, compile_commands, configure


@pytest.fixture(params=CMAKES or ["none"])
def version(request):
    """The version of a CMake: a test runs with each."""
    if request.param not in CMAKES:
        pytest.skip("no cmake")
    return request.param


@pytest.fixture
def cmake(version):
    return CMAKES[version]


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


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc to compile with")
@pytest.mark.parametrize(
    ("release", "architectures"), [("12.7", ["80", "90"]), ("12.8", ["80", "90", "100", "120"])]
)
def test_architectures_that_a_compiler_knows(release, architectures, tmp_path):
    """A compiler of another release: the one of this machine, with another answer to --version."""
    nvcc = tmp_path / "nvcc"
    real = shutil.which("nvcc")
    said = f"Cuda compilation tools, release {release}, V{release}.0"
    nvcc.write_text(f"""#!/bin/sh\n[ "$*" = --version ] && echo '{said}' || exec {real} "$@"\n""")
    nvcc.chmod(0o755)
    found = configure(tmp_path / "build", "-DRNNFAST_CUDA=ON", CUDACXX=str(nvcc))
    assert found.returncode == 0, found.stdout + found.stderr
    sources = [c for c in compile_commands(tmp_path / "build") if re.search(r"\.cu\b", c)]
    assert len(sources) == 5
    for command in sources:
        assert re.findall(r"sm_(\d+)", command) == architectures


def test_other_settings_are_errors(cmake, tmp_path):
    maybe = configure(tmp_path, "-DRNNFAST_CUDA=MAYBE", cmake=cmake)
    assert maybe.returncode != 0
    assert "RNNFAST_CUDA is MAYBE; expected OFF, ON or AUTO" in maybe.stderr
