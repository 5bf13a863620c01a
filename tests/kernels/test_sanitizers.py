"""The core by itself, by a driver in C++: under the sanitizers, and on another processor.

Who computes what depends on neither the instruction set nor the type of numbers, but on whether there
is a matrix unit. So the thread sanitizer sees one build of each. The address sanitizer looks at all.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from rnnfast import _C

ROOT = Path(__file__).parents[2]
CORE = [f"csrc/core/{name}.cpp" for name in ("beam_search", "generate", "stack", "view")]
CORE += [f"csrc/cpu/{name}.cpp" for name in ("plan", "run")]
CORE += [f"tests/support/sanitizers/{name}.cpp" for name in ("driver", "process")]
OF_AN_ISA = ["csrc/cpu/dispatch.cpp", "csrc/cpu/kernels/isa.cpp"]

AVX512 = [f"-m{f}" for f in ["avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"]]
Target = tuple[int, int, list[str]]
# As CMakeLists.txt builds them: vector bytes, vector registers, flags.
TARGETS: dict[str, Target] = {
    "baseline": (16, 16, []),
    "avx2": (32, 16, ["-mavx2", "-mfma"]),
    "avx512": (64, 32, AVX512),
    "avx512bf16": (64, 32, [*AVX512, "-mavx512bf16"]),
    "amx_emulated": (32, 16, ["-mavx2", "-mfma", "-DRNNFAST_MATRIX_UNIT=EMULATED"]),
}
AARCH64 = (16, 32, [])  # its baseline, with NEON
# RNNFAST_NUMBERS in isa.cpp; float32 with the kernels for its parts, where there is a matrix unit
NUMBERS = {"float32": 1 + 8, "float64": 2, "bfloat16": 4}
BUILDS = [(isa, dtype) for dtype in NUMBERS for isa in _C.supported_isas(dtype) if isa in TARGETS]


@pytest.fixture(scope="session")
def core(tmp_path_factory) -> Callable[..., list[Path]]:
    """The objects of the core and the driver, which every instruction set shares: compiled once."""
    made: dict[tuple[str, ...], list[Path]] = {}

    def objects(compiler: str, *flags: str) -> list[Path]:
        key = (compiler, *flags)
        if key not in made:
            folder = tmp_path_factory.mktemp("core")
            compile_into(folder, CORE, compiler, *flags)
            made[key] = sorted(folder.glob("*.o"))
        return made[key]

    return objects


def compile_into(folder: Path, sources: list[str], compiler: str, *flags: str) -> None:
    command = [
        compiler,
        "-std=c++20",
        *flags,
        "-ffp-contract=off",
        "-Wno-psabi",
        f"-I{ROOT}/csrc",
        "-c",
    ]
    subprocess.run([*command, *(ROOT / source for source in sources)], check=True, cwd=folder)


def check(isa: str, dtype: str, sanitizers: str, compiler: str, core, folder: Path) -> None:
    """Build the core for one instruction set and type of numbers, and run the driver."""
    sanitize = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-O1", "-g1"]
    empty = folder / "empty.cpp"
    empty.write_text("int main() {}\n")
    link = [compiler, *sanitize, empty, "-o", folder / "empty"]
    if subprocess.run(link, capture_output=True).returncode != 0:
        pytest.skip("the compiler comes without this sanitizer's runtime")
    run(build(compiler, isa, folder, core, sanitize, TARGETS[isa], NUMBERS[dtype]), isa)


def build(
    compiler: str, isa: str, folder: Path, core, flags: list[str], target: Target, numbers: int = 15
) -> Path:
    """The driver, with the kernels of one instruction set, for the types that RNNFAST_NUMBERS names."""
    (folder / "isas.inc").write_text(f"ISA({isa})\n")
    size, registers, own_flags = target
    own_flags = [f"-DRNNFAST_TARGET=isa_{isa}", f'-DRNNFAST_ISA_NAME="{isa}"', *own_flags]
    own_flags += [f"-DRNNFAST_VECTOR_BYTES={size}", f"-DRNNFAST_VECTOR_REGISTERS={registers}"]
    own_flags += [f"-DRNNFAST_NUMBERS={numbers}", "-I", str(folder)]
    compile_into(folder, OF_AN_ISA, compiler, *flags, *own_flags)
    objects = [*folder.glob("*.o"), *core(compiler, *flags)]
    program = folder / "driver"
    subprocess.run([compiler, *flags, *objects, "-o", program, "-pthread"], check=True)
    return program


def run(program: Path, isa: str, *emulator: str) -> None:
    env = os.environ | {"RNNFAST_ISA": isa}
    ran = subprocess.run([*emulator, program], capture_output=True, text=True, env=env)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert " 0 failures" in ran.stdout


@pytest.mark.slow
@pytest.mark.skipif(not BUILDS, reason="not x86-64")
def test_thread_sanitizer(compiler, core, tmp_path):
    check(*BUILDS[min(1, len(BUILDS) - 1)], "thread", compiler, core, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(("amx_emulated", "bfloat16") not in BUILDS, reason="no matrix unit was built")
def test_thread_sanitizer_of_a_matrix_unit(compiler, core, tmp_path):
    """Threads share the rows that they copy for it."""
    check("amx_emulated", "bfloat16", "thread", compiler, core, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("isa", "dtype"), BUILDS)
def test_address_sanitizer(isa, dtype, compiler, core, tmp_path):
    check(isa, dtype, "address,undefined", compiler, core, tmp_path)


@pytest.mark.slow
def test_aarch64(core, tmp_path):
    """The core without sanitizers, cross-compiled, under an emulator."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs g++-aarch64-linux-gnu and qemu-user")
    flags = ["-O2", "-static", "-Wall", "-Wextra", "-Werror", "-Wno-maybe-uninitialized"]
    run(build(compiler, "baseline", tmp_path, core, flags, AARCH64), "baseline", emulator)
