"""The kernels under the address, undefined-behaviour and thread sanitizers, by a driver in C++."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import rnnfast

ROOT = Path(__file__).parents[1]

AVX512 = [f"-m{f}" for f in ["avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"]]
# As CMakeLists.txt builds them: vector bytes, vector registers, flags.
TARGETS = {
    "baseline": (16, 16, []),
    "avx2": (32, 16, ["-mavx2", "-mfma"]),
    "avx512": (64, 32, AVX512),
    "avx512bf16": (64, 32, [*AVX512, "-mavx512bf16", "-DRNNFAST_BFLOAT16_ONLY"]),
}


@pytest.mark.parametrize("isa", rnnfast._C.supported_isas())
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_sanitizers(isa, sanitizers, compiler, tmp_path):
    if isa not in TARGETS:
        pytest.skip("not x86-64")
    empty = tmp_path / "empty.cpp"
    empty.write_text("int main() {}\n")
    link = [compiler, f"-fsanitize={sanitizers}", empty, "-o", tmp_path / "empty"]
    if subprocess.run(link, capture_output=True).returncode != 0:
        pytest.skip("the compiler comes without this sanitizer's runtime")
    size, registers, flags = TARGETS[isa]
    program = tmp_path / "driver"
    subprocess.run(
        [
            *(compiler, "-std=c++20", "-O1", "-g", f"-fsanitize={sanitizers}"),
            *("-fno-sanitize-recover=all", "-ffp-contract=off", "-Wno-psabi", *flags),
            *(f"-DRNNFAST_TARGET=isa_{isa}", f'-DRNNFAST_ISA_NAME="{isa}"'),
            *(f"-DRNNFAST_VECTOR_BYTES={size}", f"-DRNNFAST_VECTOR_REGISTERS={registers}"),
            *("-I", ROOT / "csrc", ROOT / "csrc/cpu/isa.cpp"),
            *(ROOT / "tests/sanitizers/driver.cpp", "-o", program, "-pthread"),
        ],
        check=True,
    )
    run = subprocess.run([program], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " 0 failures" in run.stdout
