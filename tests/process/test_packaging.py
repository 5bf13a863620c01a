"""What is built and installed: symbols, instructions, stubs, layers, commands."""

from __future__ import annotations

import ast
import math
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import rnnfast
from cmakes import CMAKE, compile_commands, configure
from rnnfast import _C

ROOT = Path(__file__).parents[2]
PACKAGE = Path(rnnfast.__file__).parent


def objects():
    """The object files of the build tree."""
    if not (ROOT / "csrc").is_dir():
        pytest.skip("the tests run outside the source tree: no object files to look at")
    found = sorted(ROOT.glob("build/**/*.o"))
    assert any(isa_of(path) for path in found), "no object files of isa.cpp under build/"
    return found


def isa_of(path):
    """The instruction set for which an object file was compiled, None for those that are not."""
    match = re.search(r"/isa_(\w+)\.dir/", str(path))
    return match and match[1]


def output(*command, **options):
    return subprocess.run(command, check=True, capture_output=True, text=True, **options).stdout


def test_no_stray_weak_symbols():
    """The linker keeps one copy of a weak function: one with AVX-512 in it, maybe, for all."""
    stray = []
    for path in objects():
        if isa_of(path) is None:
            continue
        own = f"rnnfast::isa_{isa_of(path)}::"
        for line in output("nm", "-C", str(path)).splitlines():
            kind, name = re.match(r"[0-9a-f]* +(\w) (.*)", line).groups()
            if kind in "WVuv" and own not in name:
                stray.append(f"{path.relative_to(ROOT)}: {kind} {name}")
    assert not stray, "\n".join(stray)


@pytest.mark.skipif(CMAKE is None, reason="no CMake")
@pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="the tests run outside the source tree")
def test_a_native_build_has_the_instruction_sets_that_this_machine_chooses(tmp_path):
    built = {}
    for native in "ON", "OFF":
        folder = tmp_path / native
        ran = configure(folder, f"-DRNNFAST_NATIVE={native}", "-DRNNFAST_EMULATED=ON")
        assert ran.returncode == 0, ran.stderr
        built[native] = re.findall(r"ISA\((\w+)\)", (folder / "generated" / "isas.inc").read_text())
    assert set(built["OFF"]) >= set(_C.supported_isas())
    unusable = {"amx"} - set(_C.supported_isas())  # its use may not be permitted
    of_this_machine = [isa for isa in built["OFF"] if isa in _C.supported_isas()]
    if "avx512" in of_this_machine:
        of_this_machine = [isa for isa in of_this_machine if isa != "avx2"]
    assert [isa for isa in built["ON"] if isa not in unusable] == of_this_machine


@pytest.mark.skipif(CMAKE is None, reason="no CMake")
@pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="the tests run outside the source tree")
class TestConfigure:
    """What CMake makes of a machine. `project()` includes a file that pretends to be on another one."""

    def ask(self, tmp_path, pretended="", **environment):
        (tmp_path / "pretended.cmake").write_text(pretended)
        include = f"-DCMAKE_PROJECT_rnnfast_INCLUDE={tmp_path / 'pretended.cmake'}"
        return configure(tmp_path / "build", include, **environment)

    def test_64_bit_arm_has_the_baseline_alone(self, tmp_path):
        ran = self.ask(tmp_path, "set(CMAKE_SYSTEM_PROCESSOR aarch64)")
        assert ran.returncode == 0, ran.stderr
        assert (tmp_path / "build/generated/isas.inc").read_text() == "ISA(baseline)\n"
        (command,) = (c for c in compile_commands(tmp_path / "build") if "kernels/isa.cpp" in c)
        assert "-DRNNFAST_VECTOR_BYTES=16 -DRNNFAST_VECTOR_REGISTERS=32" in command
        assert "-ffp-contract=off" in command
        assert not re.search(r" (16|32) ", command)

    @pytest.mark.parametrize("flag", ["-ffast-math", "-Ofast", "-ffinite-math-only"])
    def test_options_that_change_numbers_are_refused(self, flag, tmp_path):
        ran = self.ask(tmp_path, CXXFLAGS=f"-g {flag}")
        assert ran.returncode != 0
        assert f"the compiler options have {flag}" in " ".join(ran.stderr.split())

    def test_an_old_gcc_is_refused(self, tmp_path):
        old = "set(CMAKE_CXX_COMPILER_ID GNU)\nset(CMAKE_CXX_COMPILER_VERSION 11.4.0)"
        ran = self.ask(tmp_path, old)
        assert ran.returncode != 0
        assert "this is GCC 11.4.0; rnnfast needs GCC 12 or later" in " ".join(ran.stderr.split())

    @pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="not x86-64")
    def test_an_architecture_in_cxxflags_does_not_reach_the_kernels(self, tmp_path):
        assert self.ask(tmp_path, CXXFLAGS="-march=native").returncode == 0
        kernels = [c for c in compile_commands(tmp_path / "build") if "kernels/isa.cpp" in c]
        assert len(kernels) >= 5
        for command in kernels:
            assert re.findall(r"-march=\S+", command) == ["-march=native", "-march=x86-64"]
            assert command.index("-march=x86-64") < command.find("-mavx2") % len(command)


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.skipif(not (ROOT / "Makefile").is_file(), reason="the tests run outside the source tree")
def test_programs_of_the_environment_come_first_in_make():
    """An editable installation calls `cmake` at import, which the machine may have only there."""
    show = ["make", "--silent", "--eval", "show:\n\t@echo $$PATH", "show", "VENV=.venv-other"]
    assert output(*show, cwd=ROOT).startswith(f"{ROOT}/.venv-other/bin:")


def test_wide_instructions_only_where_they_were_chosen():
    """Or the module would die on a machine without them, before it could choose."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the registers have other names on other processors")
    plain = [path for path in objects() if isa_of(path) in (None, "baseline")]
    assert plain
    for path in plain:
        code = output("objdump", "-d", "--no-show-raw-insn", str(path))
        wide = re.findall(r"^.*%[yz]mm\d.*$|^.*\bv[a-z0-9]+ +.*%xmm.*$", code, re.MULTILINE)
        assert not wide, f"{path.relative_to(ROOT)}: {wide[:3]}"


def test_every_instruction_set_is_in_the_build():
    built = {isa_of(path) for path in objects()} - {None}
    assert set(_C.supported_isas()) <= built
    if platform.machine() in ("x86_64", "AMD64"):
        assert {"baseline", "avx2", "avx512", "avx512bf16"} <= built


def test_libtorch_is_not_linked():
    needed = re.findall(r"NEEDED +(\S+)", output("objdump", "-p", _C.__file__))
    assert needed
    assert not [name for name in needed if re.match(r"lib(torch|c10)", name)]
    assert "libgomp.so.1" in needed or any("omp" in name for name in needed)


def test_stub_names_the_functions_of_the_module():
    tree = ast.parse((PACKAGE / "_C.pyi").read_text())
    stub = {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    }
    assert stub == {name for name in dir(_C) if not name.startswith("_")}


def test_stub_has_the_arguments_of_the_module():
    """From pybind11's own signature, `forward(cell: int, ...) -> None`."""
    tree = ast.parse((PACKAGE / "_C.pyi").read_text())
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            text = getattr(_C, node.name).__doc__.splitlines()[0]
            real = ast.parse(f"def {re.sub(r'<[^>]*>', 'None', text)}: ...").body[0]
            counts = [len(f.args.posonlyargs + f.args.args) for f in (node, real)]
            assert counts[0] == counts[1], node.name


HEADERS = ["gru", "lstm", "lstm_coupled", "rnn"]


@pytest.mark.parametrize("header", HEADERS)
def test_the_header_of_a_cell_can_be_read_alone(header, compiler, tmp_path):
    """By an editor, which knows no instruction set."""
    source = tmp_path / "alone.cpp"
    source.write_text(f'#include "cells/{header}.h"\n')
    flags = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-I", ROOT / "csrc"]
    subprocess.run([compiler, *flags, source], check=True)


def test_no_other_headers_of_cells():
    others = {"cells", "contract", "info", "math", "number", "scalar"}
    assert {path.stem for path in (ROOT / "csrc/cells").glob("*.h")} == {*HEADERS, *others}


FORMULA = """
#include "cells/gru.h"
#include <cstdio>
using namespace rnnfast::alone;
int main() {
  double s[Gru::slots] = {0.3, -0.2, 0.5, 0.1};
  std::printf("%.15f", Gru::forward<0>(s, 0.7, 0.0));
}
"""


def test_a_formula_can_be_tried_alone(compiler, tmp_path):
    source, program = tmp_path / "formula.cpp", tmp_path / "formula"
    source.write_text(FORMULA)
    subprocess.run([compiler, "-std=c++20", "-I", ROOT / "csrc", source, "-o", program], check=True)
    found = float(subprocess.run([program], check=True, capture_output=True, text=True).stdout)
    r, z = 1 / (1 + math.exp(0.2)), 1 / (1 + math.exp(-0.5))
    n = math.tanh(0.3 + r * 0.1)
    assert abs(found - ((1 - z) * n + z * 0.7)) < 1e-14


def test_typed():
    assert (PACKAGE / "py.typed").is_file()


@pytest.mark.parametrize("command", ["module", "script"])
def test_info(command):
    script = shutil.which("rnnfast", path=str(Path(sys.executable).parent))
    if command == "script":
        assert script, "no console script beside the interpreter"
    start = [sys.executable, "-m", "rnnfast"] if command == "module" else [script]
    text = subprocess.run(
        [*start, "info"], check=True, capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout
    for word in (rnnfast.__version__, *_C.supported_isas(), "OpenMP"):
        assert word in text
    failed = subprocess.run([*start, "nonsense"], capture_output=True, cwd=Path(__file__).parent)
    assert failed.returncode == 2


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", rnnfast.__version__)


SCRIPTS = ["beside_cudnn.py", "compiled.py", "neighbours.py", "partition.py", "tables.py"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_benchmarks_start_as_scripts(script):
    # Their folder then comes first in the search path: a file named as a package hides it from torch.
    ran = [sys.executable, ROOT / "benchmarks" / script, "--help"]
    shown = subprocess.run(ran, capture_output=True, text=True, cwd="/")
    assert shown.returncode == 0, shown.stderr
    assert f"python benchmarks/{script}" in shown.stdout


def test_the_page_of_results_is_that_of_the_samples(tmp_path):
    results = ROOT / "benchmarks" / "results"
    shutil.copytree(results, tmp_path / "results")
    page = tmp_path / "results" / "README.md"
    page.unlink()
    command = [sys.executable, ROOT / "benchmarks" / "tables.py", "--folder", tmp_path / "results"]
    subprocess.run(command, check=True)
    assert page.read_text() == (results / "README.md").read_text()
    assert "## " in page.read_text()
