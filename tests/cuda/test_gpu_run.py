"""benchmarks/gpu/run.sh and build.sh, with other programs in the place of those that need a device."""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import rnnfast

ROOT = Path(__file__).parents[2]
GPU = ROOT / "benchmarks/gpu"
CALLS = [
    *("right", "check", "costs", "times", "counters", "memcheck", "racecheck", "synccheck", "threads"),
]
MOST_SECONDS = 480  # of a call: where a command has a time limit, it is often ten minutes
TOOLS = ("nvidia-smi", "nvcc", "ncu", "compute-sanitizer", "python")

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


@pytest.fixture
def programs(tmp_path):
    """A folder that is first on PATH. All tools in it succeed."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for tool in TOOLS:
        program(folder / tool, "exit 0")
    program(folder / "nproc", "echo 16")
    return folder


def program(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def call(script, *arguments, programs, out, **environment):
    settings = {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHON": str(programs / "python"),
        "OUT": str(out),
    }
    return subprocess.run(
        ["bash", GPU / script, *arguments],
        cwd=ROOT,
        env=os.environ | settings | environment,
        capture_output=True,
        text=True,
        timeout=100,
    )


def table(ran):
    """The steps and how they ended, from the last lines."""
    lines = ran.stdout.rpartition("\n== ")[2].splitlines()[1:]
    return dict(re.split(r"  +", line, maxsplit=1) for line in lines)


@pytest.mark.parametrize("name", CALLS)
def test_the_limits_of_a_call(name, programs, tmp_path):
    """Each step may end 5 s after its limit, and all together within the limit of a call."""
    program(programs / "timeout", f'echo "$5" >> {tmp_path}/limits')
    ran = call("run.sh", name, programs=programs, out=tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    limits = [int(limit) for limit in (tmp_path / "limits").read_text().split()]
    assert len(limits) == len(table(ran)) > 1
    assert sum(limits) + 5 * len(limits) <= MOST_SECONDS


def test_all_calls_are_described(programs, tmp_path):
    wrong = call("run.sh", "all", programs=programs, out=tmp_path)
    assert wrong.returncode == 2
    named = wrong.stderr.partition("expected ")[2]
    assert re.findall(r"\w+", named.replace(" or ", " ")) == CALLS
    text = (GPU / "README.md").read_text()
    assert sorted(re.findall(r"^\| `run\.sh (\w+)` \|", text, re.MULTILINE)) == sorted(CALLS)


def test_a_failed_step_is_in_the_table_and_in_the_exit_status(programs, tmp_path):
    program(programs / "python", 'case "$*" in *"and (cluster)"*) exit 3;; esac')
    ran = call("run.sh", "right", programs=programs, out=tmp_path)
    assert ran.returncode == 1
    assert table(ran) == {
        "import": "passed",
        "facts": "passed",
        "info": "passed",
        "tests: block": "passed",
        "tests: cluster": "failed: exit status 3",
        "tests: grid": "passed",
        "tests: the others": "passed",
    }
    assert (tmp_path / "right.txt").read_text() == ran.stdout


def test_all_steps_passed(programs, tmp_path):
    ran = call("run.sh", "right", str(tmp_path / "other"), programs=programs, out=tmp_path)
    assert ran.returncode == 0
    assert set(table(ran).values()) == {"passed"}
    assert (tmp_path / "other/right.txt").is_file()  # the argument is before OUT


def test_a_step_that_does_not_end_says_where_it_was(programs, tmp_path):
    """And the steps after it run."""
    program(programs / "timeout", f'shift 5\nexec {shutil.which("timeout")} -s ABRT -k 5 3 "$@"')
    waits = f'exec {sys.executable} -c "import time\ndef waits(): time.sleep(60)\nwaits()"'
    program(programs / "python", f'case "$*" in *"and (grid)"*) {waits};; esac')
    ran = call("run.sh", "right", programs=programs, out=tmp_path)
    assert ran.returncode == 1
    found = table(ran)
    assert found["tests: grid"] == "stopped after 75 s"
    assert found["tests: the others"] == "passed"
    assert re.search(r"Fatal Python error: Aborted\n(.*\n)*.* in waits", ran.stdout)


def test_without_the_package_no_step_runs(programs, tmp_path):
    program(programs / "python", "echo 'AssertionError: no libfoo'; exit 1")
    ran = call("run.sh", "right", programs=programs, out=tmp_path)
    assert ran.returncode == 1
    assert "no libfoo" in ran.stdout
    assert table(ran) == {"import": "failed: exit status 1"}


def test_tests_print_their_names_before_they_run(programs, tmp_path):
    """pyproject.toml has -q, which one -v would only take back."""
    program(programs / "python", f'echo "$PYTHONFAULTHANDLER $*" >> {tmp_path}/commands')
    call("run.sh", "right", programs=programs, out=tmp_path)
    tests = [c for c in (tmp_path / "commands").read_text().splitlines() if "pytest" in c]
    assert len(tests) == 4
    assert all(command.startswith("1 ") and " -vv --tb=short " in command for command in tests)


def test_every_test_is_in_one_step():
    """The expressions that select tests divide them: none is left out, none runs twice."""
    collect = [sys.executable, "-m", "pytest", "tests/cuda/test_cuda.py", "--collect-only"]
    command = [*collect, "-p", "no:cacheprovider", "-k", "not emulated"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    names = re.findall(r"^tests/.*::(.*)$", said, re.MULTILINE)
    assert len(names) > 100
    lines = re.findall(r"^ +tests (.*)$", (GPU / "run.sh").read_text(), re.MULTILINE)
    expressions = [re.sub(r"\w+", has, shlex.split(line)[1]) for line in lines]
    assert len(expressions) == 4
    for name in names:
        found = [expression for expression in expressions if eval(expression, {"name": name.lower()})]
        assert len(found) == 1, (name, found)


def has(word):
    """A word of pytest's -k in Python."""
    return word[0] if word[0] in ("not", "and", "or") else f"({word[0]!r} in name)"


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_a_sanitizer_finds(tool, programs, tmp_path):
    """It fails after an error, sees every piece of memory, and looks at this package's kernels."""
    says = 'echo "$PYTORCH_NO_CUDA_MEMORY_CACHING $RNNFAST_CUDA_TIER $*"'
    program(programs / "compute-sanitizer", says)
    ran = call("run.sh", tool, programs=programs, out=tmp_path)
    said = [line for line in ran.stdout.splitlines() if "step.py" in line]
    options = f"--tool {tool} --error-exitcode 1 --kernel-regex kns=rnnfast"
    assert all(re.match(rf"1 (block|cluster|grid) {options}", line) for line in said)
    assert len(said) == len(set(said)) == 6
    assert sum("--packed" in line for line in said) == 3
    program(programs / "compute-sanitizer", "exit 1")
    assert call("run.sh", tool, programs=programs, out=tmp_path).returncode == 1


@pytest.mark.parametrize(("cores", "threads"), [(1, [1]), (6, [1, 2, 4]), (16, [1, 2, 4, 8, 16])])
def test_threads_up_to_the_cores(cores, threads, programs, tmp_path):
    program(programs / "nproc", f"echo {cores}")
    ran = call("run.sh", "threads", programs=programs, out=tmp_path)
    assert ran.returncode == 0
    assert list(table(ran)) == ["import", *(f"threads {n}" for n in threads)]


class Parsed(Exception):  # noqa: N818
    """The arguments of a program are valid."""


def test_the_programs_know_their_arguments(programs, tmp_path, monkeypatch):
    """Those that run.sh gives them, also through ncu and compute-sanitizer."""
    log = f'printf "%s\\t" "$@" >> {tmp_path}/commands; echo >> {tmp_path}/commands'
    for tool in ("python", "ncu", "compute-sanitizer"):
        program(programs / tool, log)
    for name in CALLS:
        call("run.sh", name, programs=programs, out=tmp_path)
    commands = [line.split("\t")[:-1] for line in (tmp_path / "commands").read_text().splitlines()]
    parse, main = argparse.ArgumentParser.parse_args, Path(rnnfast.__file__).parent / "__main__.py"

    def parsed(parser, *arguments):
        parse(parser, *arguments)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    seen = set()
    for command in commands:
        start = next((i for i, word in enumerate(command) if re.search(r"\.py$|^rnnfast$", word)), None)
        if start is None or "pytest" in command:
            continue
        file = command[start]
        seen.add(Path(file).name)
        monkeypatch.setattr(sys, "argv", command[start:])
        with pytest.raises(Parsed):
            runpy.run_path(str(main if file == "rnnfast" else ROOT / file), run_name="__main__")
    assert seen == {"rnnfast", "check.py", "beside_cudnn.py", "parts.py", "step.py"}


# --- build.sh -------------------------------------------------------------------------------------
def test_what_build_does(programs, tmp_path):
    program(programs / "cmake", f'echo "$*" >> {tmp_path}/commands')
    program(programs / "python", "[ $1 = -m ] && echo /headers || cat > /dev/null")
    folder = tmp_path / "package"
    stale = folder / "rnnfast/removed.py"
    stale.parent.mkdir(parents=True)
    stale.touch()
    options = (str(folder), "-DRNNFAST_NATIVE=ON")
    ran = call("build.sh", *options, programs=programs, out=tmp_path, JOBS="3")
    assert ran.returncode == 0, ran.stderr
    configures, builds, installs = (tmp_path / "commands").read_text().splitlines()
    for option in (
        "-DRNNFAST_CUDA=ON",
        "-DCMAKE_CUDA_ARCHITECTURES=90-real",
        f"-DPython_EXECUTABLE={programs}/python",
        "-Dpybind11_DIR=/headers",
        "-DRNNFAST_NATIVE=ON",
    ):
        assert option in configures.split()
    assert builds == f"--build {folder}.objects --parallel 3"
    assert installs == f"--install {folder}.objects --prefix {folder}"
    sources = ROOT / "rnnfast"
    wanted = {
        p.relative_to(sources) for p in sources.rglob("*") if p.suffix in (".py", ".pyi", ".json")
    }
    found = {p.relative_to(folder / "rnnfast") for p in (folder / "rnnfast").rglob("*") if p.is_file()}
    assert wanted <= found
    assert not stale.exists()
    assert not any(path.suffix in (".pyc", ".so") for path in found)


def test_build_says_what_is_missing(programs, tmp_path):
    program(programs / "cmake", "exit 1")
    ran = call("build.sh", str(tmp_path / "package"), programs=programs, out=tmp_path)
    assert ran.returncode == 1
    ran = call("build.sh", programs=programs, out=tmp_path, PYTHON=str(programs / "none"))
    assert ran.returncode == 1
    assert f"{programs}/none is no interpreter" in ran.stderr
