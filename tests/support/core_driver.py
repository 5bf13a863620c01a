"""Builds and runs sanitizers/driver.cpp: the core, with the kernels of a few instruction sets."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import threads
from rnnfast import _C

ROOT = Path(__file__).parents[2]
CORE = [f"csrc/core/{name}.cpp" for name in ("beam_search", "generate", "stack", "view")]
CORE += [f"csrc/cpu/{name}.cpp" for name in ("plan", "run")]
CORE += [f"tests/support/sanitizers/{name}.cpp" for name in ("driver", "guarded", "process")]

AVX512 = [f"-m{f}" for f in ["avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"]]
AMX = [f"-m{f}" for f in ["avx512bf16", "amx-tile", "amx-bf16"]]
AMX_ON_CPU = ROOT / "tests/support/amx_on_cpu"
Target = tuple[int, int, int, list[str]]
# As CMakeLists.txt builds them: vector bytes, vector registers, RNNFAST_NUMBERS, flags.
TARGETS: dict[str, Target] = {
    "baseline": (16, 16, 63, []),
    "avx2": (32, 16, 63, ["-mavx2", "-mfma"]),
    "avx512": (64, 32, 63, AVX512),
    "avx512bf16": (64, 32, 4, [*AVX512, "-mavx512bf16"]),
    "amx_emulated": (64, 32, 61, [*AVX512, "-DRNNFAST_MATRIX_UNIT=EMULATED"]),
    "amx": (64, 32, 60, [*AVX512, *AMX, "-DRNNFAST_MATRIX_UNIT=AMX"]),
}
AARCH64 = (16, 32, 63, [])  # its baseline, with NEON
# Bits of RNNFAST_NUMBERS in isa.cpp. On a matrix unit the driver computes float32 in three parts.
NUMBERS = {"float32": 1 + 32, "float64": 2, "bfloat16": 4}


def compile_into(folder: Path, sources: Sequence[str | Path], compiler: str, *flags: str) -> None:
    command = [compiler, "-std=c++20", *flags, "-ffp-contract=off", "-Wno-psabi"]
    command += [f"-I{ROOT}/csrc", "-c", *(str(ROOT / source) for source in sources)]
    folder.mkdir(exist_ok=True)
    subprocess.run(command, check=True, cwd=folder)


def build(
    compiler: str,
    isa: str,
    target: Target,
    folder: Path,
    core: list[Path],
    flags: list[str],
    numbers: int = 63,
) -> Path:
    """The driver, with kernels for the types that RNNFAST_NUMBERS names, compiled with these flags."""
    size, registers, own_numbers, own_flags = target
    defined = {
        "TARGET": f"isa_{isa}",
        "ISA_NAME": f'"{isa}"',
        "VECTOR_BYTES": size,
        "VECTOR_REGISTERS": registers,
        "NUMBERS": numbers & own_numbers,
    }
    own_flags = own_flags + [f"-DRNNFAST_{name}={value}" for name, value in defined.items()]
    compile_into(folder, ["csrc/cpu/kernels/isa.cpp"], compiler, *flags, *own_flags)
    return link(compiler, [isa], folder, [folder / "isa.o", *core], flags)


def link(
    compiler: str, isas: Sequence[str], folder: Path, objects: Sequence[Path], flags: list[str]
) -> Path:
    """The driver, from the objects of the core and of the kernels of these instruction sets."""
    (folder / "isas.inc").write_text("".join(f"ISA({isa})\n" for isa in isas))
    objects, of_dispatch = [*objects], ["-I", str(folder)]
    if "amx" in isas and "amx" not in _C.supported_isas():
        compile_into(folder, [AMX_ON_CPU / "processor.cpp"], compiler, *flags, *AVX512, "-O2")
        objects.append(folder / "processor.o")
        of_dispatch += ["-include", str(AMX_ON_CPU / "supported.h")]
    compile_into(folder, ["csrc/cpu/dispatch.cpp"], compiler, *flags, *of_dispatch)
    objects.append(folder / "dispatch.o")
    program = folder / "driver"
    subprocess.run([compiler, *flags, *objects, "-o", program, "-pthread"], check=True)
    return program


def of_extension(isa: str) -> Path | None:
    """The object with the kernels of an instruction set from which the extension was linked.

    None if the installation is not an editable one, which keeps its build folder.
    """
    folders = Path(_C.__file__).parents
    found = [*(folders[3] / "CMakeFiles" / f"isa_{isa}.dir").rglob("*.o")] if len(folders) > 3 else []
    return found[0] if len(found) == 1 else None


def run(
    program: Path,
    isa: str,
    *emulator: str,
    every: int = 1,
    guards: str = "none",
    dtypes: Sequence[str] = (),
) -> str:
    """What the driver prints, of every problem or of a part of them.

    Its threads, up to six, run on `threads.SHARED`. The thread sanitizer still finds races there: with
    one of four barriers of forward and backward removed it needed as little time as on two processors.
    """
    env = os.environ | {"RNNFAST_ISA": isa, "TSAN_OPTIONS": "halt_on_error=1"}
    command = [*emulator, program, str(every), guards, *dtypes]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=env, **pipes) as process:
        os.sched_setaffinity(process.pid, threads.SHARED)  # its threads inherit this
        out, errors = process.communicate()
    assert process.returncode == 0, out + errors
    assert " 0 failures" in out
    return out
