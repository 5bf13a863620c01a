"""The core by itself, by a driver in C++: under the sanitizers, with guards, and on other processors.

Who computes what depends on neither the instruction set nor the type of numbers, but on whether there
is a matrix unit. So the thread sanitizer sees one build of each. The address sanitizer sees the widest
vectors with every type of numbers, the narrowest, and the matrix unit. The machine code of the
extension itself runs with guards at the ends of all buffers, for every instruction set. Undefined
operations are those of the source: the sanitizer for them sees one instruction set.
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

import core_driver
from core_driver import NUMBERS, build, run
from made_once import made_once
from rnnfast import _C

TARGETS = core_driver.TARGETS
BUILDS = [(isa, dtype) for dtype in NUMBERS for isa in _C.supported_isas(dtype) if isa in TARGETS]
UNITS = ("amx_emulated", "amx")
WIDEST = [isa for isa in ("baseline", "avx2", "avx512") if isa in _C.supported_isas()][-1]
#: What the address sanitizer sees beside the matrix unit.
SANITIZED = [(isa, dtype) for isa, dtype in BUILDS if isa in (WIDEST, "avx512bf16")]
SANITIZED += [("baseline", "float32")] if WIDEST != "baseline" else []


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory) -> Path:
    """A folder of this run, for all of pytest's workers."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def core(shared_folder) -> Callable[..., list[Path]]:
    """The objects of the core and the driver, which every instruction set shares."""

    def objects(compiler: str, *flags: str) -> list[Path]:
        def make(folder: Path) -> None:
            core_driver.compile_into(folder, core_driver.CORE, compiler, *flags)

        name = hashlib.sha256(repr((compiler, *flags)).encode()).hexdigest()[:12]
        return sorted(made_once(shared_folder / f"core-{name}", make).glob("*.o"))

    return objects


def sanitized(sanitizers: str, isa: str, dtype: str, compiler: str, core, folder: Path) -> Path:
    """The driver, with the kernels of an instruction set for one type of numbers."""
    # -Og: with -O1 the checks of addresses need 1.7 times as long to compile and run.
    flags = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-Og", "-g1"]
    empty = folder / "empty.cpp"
    empty.write_text("int main() {}\n")
    link = [compiler, *flags, empty, "-o", folder / "empty"]
    if subprocess.run(link, capture_output=True).returncode != 0:
        pytest.skip("the compiler comes without this sanitizer's runtime")
    return build(compiler, isa, TARGETS[isa], folder, core(compiler, *flags), flags, NUMBERS[dtype])


@pytest.mark.slow
@pytest.mark.skipif(not BUILDS, reason="not x86-64")
def test_thread_sanitizer(compiler, core, tmp_path):
    run(sanitized("thread", WIDEST, "float32", compiler, core, tmp_path), WIDEST)


@pytest.mark.slow
@pytest.mark.skipif(("amx_emulated", "bfloat16") not in BUILDS, reason="no matrix unit was built")
def test_thread_sanitizer_of_a_matrix_unit(compiler, core, tmp_path):
    """Threads share the rows that they copy for it."""
    isa = "amx_emulated"
    run(sanitized("thread", isa, "bfloat16", compiler, core, tmp_path), isa)


@pytest.mark.slow
@pytest.mark.parametrize(("isa", "dtype"), SANITIZED)
def test_address_sanitizer(isa, dtype, compiler, core, tmp_path):
    sanitizers = "address,undefined" if isa == WIDEST else "address"
    run(sanitized(sanitizers, isa, dtype, compiler, core, tmp_path), isa)


@pytest.mark.slow
@pytest.mark.skipif("amx_emulated" not in _C.supported_isas(), reason="no matrix unit was built")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_address_sanitizer_of_a_matrix_unit(dtype, compiler, core, tmp_path):
    isa = "amx_emulated"
    run(sanitized("address,undefined", isa, dtype, compiler, core, tmp_path), isa)


@pytest.fixture
def extensions_driver(compiler, core, shared_folder):
    """The driver with the kernels from which the extension was linked, of all instruction sets."""
    isas = [isa for isa in TARGETS if isa in _C.supported_isas()]
    if "avx512bf16" in isas and "amx" not in isas:
        isas.append("amx")  # on an emulated processor
    objects = [core_driver.of_extension(isa) for isa in isas]
    if None in objects:
        pytest.skip("rnnfast is not installed in editable mode, so there are no objects")
    flags = ["-O2"]

    def make(folder: Path) -> None:
        core_driver.link(compiler, isas, folder, [*core(compiler, *flags), *objects], flags)

    return made_once(shared_folder / "extensions_driver", make) / "driver"


@pytest.mark.slow
@pytest.mark.parametrize(("guards", "every"), [("at_end", 1), ("at_start", 3)])
@pytest.mark.parametrize(("isa", "dtype"), BUILDS)
def test_guards(isa, dtype, guards, every, extensions_driver):
    """The machine code of the extension touches nothing outside of its buffers."""
    run(extensions_driver, isa, every=every, guards=guards, dtypes=[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("guards", ["at_end", "at_start"])
def test_guards_stop_a_program_outside_of_its_buffers(guards, extensions_driver):
    command = [extensions_driver, "1", guards, "outside"]
    stopped = subprocess.run(command, capture_output=True, text=True)
    assert stopped.returncode == 3
    assert stopped.stderr == "touches memory outside of its buffers: a control\n"


@pytest.mark.slow
@pytest.mark.skipif("avx512bf16" not in _C.supported_isas(), reason="needs AVX512-BF16")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_machine_code_of_a_matrix_unit(dtype, extensions_driver):
    """It has the bits of its emulation in vector code."""
    # An emulated processor needs two microseconds and more for a tile instruction.
    options = {"every": 11, "guards": "at_end", "dtypes": [dtype]}
    printed = [run(extensions_driver, isa, **options) for isa in UNITS]
    digests = [re.findall(r"digest (\w+)", text) for text in printed]
    assert len(digests[0]) == 1
    assert digests[0] == digests[1]


@pytest.mark.slow
def test_aarch64(core, tmp_path):
    """The core without sanitizers, cross-compiled, under an emulator."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs g++-aarch64-linux-gnu and qemu-user")
    flags = ["-O2", "-static", "-Wall", "-Wextra", "-Werror", "-Wno-maybe-uninitialized"]
    isa = "baseline"
    program = build(compiler, isa, core_driver.AARCH64, tmp_path, core(compiler, *flags), flags)
    run(program, isa, emulator, every=3)  # an emulator needs minutes for all problems
