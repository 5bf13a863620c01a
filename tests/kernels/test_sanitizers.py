"""The core by itself, by a driver in C++: under the sanitizers, and on other processors.

Who computes what depends on neither the instruction set nor the type of numbers, but on whether there
is a matrix unit. So the thread sanitizer sees one build of each. The address sanitizer looks at all.
Undefined operations are those of the source: the sanitizer for them sees one instruction set.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

import core_driver
from core_driver import NUMBERS, build, run
from rnnfast import _C

TARGETS = core_driver.TARGETS
BUILDS = [(isa, dtype) for dtype in NUMBERS for isa in _C.supported_isas(dtype) if isa in TARGETS]
UNITS = ("amx_emulated", "amx")
AVX512 = "avx512" in _C.supported_isas()


@pytest.fixture(scope="session")
def core(tmp_path_factory) -> Callable[..., list[Path]]:
    """The objects of the core and the driver, which every instruction set shares.

    They are compiled once for all of pytest's workers.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # of this run

    def objects(compiler: str, *flags: str) -> list[Path]:
        name = hashlib.sha256(repr((compiler, *flags)).encode()).hexdigest()[:12]
        folder = shared / f"core-{name}"
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                made = folder.with_suffix(".made")
                core_driver.compile_into(made, core_driver.CORE, compiler, *flags)
                made.rename(folder)
        return sorted(folder.glob("*.o"))

    return objects


def sanitized(sanitizers: str, isas: list[str], dtype: str, compiler: str, core, folder: Path) -> Path:
    """The driver, with the kernels of the instruction sets for one type of numbers."""
    # -Og: with -O1 the checks of addresses need 1.7 times as long to compile and run.
    flags = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-Og", "-g1"]
    empty = folder / "empty.cpp"
    empty.write_text("int main() {}\n")
    link = [compiler, *flags, empty, "-o", folder / "empty"]
    if subprocess.run(link, capture_output=True).returncode != 0:
        pytest.skip("the compiler comes without this sanitizer's runtime")
    targets = {isa: TARGETS[isa] for isa in isas}
    return build(compiler, targets, folder, core(compiler, *flags), flags, NUMBERS[dtype])


@pytest.mark.slow
@pytest.mark.skipif(not BUILDS, reason="not x86-64")
def test_thread_sanitizer(compiler, core, tmp_path):
    isa, dtype = BUILDS[min(1, len(BUILDS) - 1)]
    run(sanitized("thread", [isa], dtype, compiler, core, tmp_path), isa)


@pytest.mark.slow
@pytest.mark.skipif(("amx_emulated", "bfloat16") not in BUILDS, reason="no matrix unit was built")
def test_thread_sanitizer_of_a_matrix_unit(compiler, core, tmp_path):
    """Threads share the rows that they copy for it."""
    isa = "amx_emulated"
    run(sanitized("thread", [isa], "bfloat16", compiler, core, tmp_path), isa)


@pytest.mark.slow
@pytest.mark.parametrize(("isa", "dtype"), [build for build in BUILDS if build[0] not in UNITS])
def test_address_sanitizer(isa, dtype, compiler, core, tmp_path):
    sanitizers = "address,undefined" if isa == ("avx512" if AVX512 else "baseline") else "address"
    run(sanitized(sanitizers, [isa], dtype, compiler, core, tmp_path), isa)


@pytest.mark.slow
@pytest.mark.skipif("avx512bf16" not in _C.supported_isas(), reason="needs AVX512-BF16")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_address_sanitizer_of_a_matrix_unit(dtype, compiler, core, tmp_path):
    """The unit's machine code, and its emulation in vector code: all results have the same bits."""
    program = sanitized("address,undefined", list(UNITS), dtype, compiler, core, tmp_path)
    run(program, "amx_emulated")
    # An emulated processor needs two microseconds and more for a tile instruction.
    digests = [re.findall(r"digest (\w+)", run(program, isa, every=11)) for isa in UNITS]
    assert len(digests[0]) == 1
    assert digests[0] == digests[1]


@pytest.mark.slow
def test_aarch64(core, tmp_path):
    """The core without sanitizers, cross-compiled, under an emulator."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs g++-aarch64-linux-gnu and qemu-user")
    flags = ["-O2", "-static", "-Wall", "-Wextra", "-Werror", "-Wno-maybe-uninitialized"]
    targets = {"baseline": core_driver.AARCH64}
    program = build(compiler, targets, tmp_path, core(compiler, *flags), flags)
    run(program, "baseline", emulator, every=3)  # an emulator needs minutes for all problems
