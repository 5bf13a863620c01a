from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# OpenMP reads this when it is loaded. A thread that spins while it waits takes a processor from another
# test. Child processes keep the default.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
import torch

del os.environ["OMP_WAIT_POLICY"]

from hypothesis import settings

import cuda_on_cpu
from made_once import made_once
from rnnfast import _C
from seeds import seed
from threads import set_threads

# The same examples at every run: a failure here is a failure everywhere.
settings.register_profile("rnnfast", derandomize=True, deadline=None, database=None)
settings.load_profile("rnnfast")

EMULATED = "amx_emulated"
SUPPORT = Path(__file__).parent / "support"


def pytest_configure(config):
    for marker in (
        "numerics(dtype): depends on the instruction set, and runs in each that has kernels for dtype",
        "slow: builds for minutes; only .ci/run runs it",
    ):
        config.addinivalue_line("markers", marker)


def pytest_collection_finish():
    """The garbage collector need not look at the collected tests in each of its passes."""
    gc.collect()
    gc.freeze()


# Last, so that the instruction sets of one case follow one another: they share its float64 truth.
@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc):
    if mark := metafunc.definition.get_closest_marker("numerics"):
        dtype = mark.kwargs.get("dtype", "float32")
        metafunc.fixturenames.append("isa")
        isas = _C.supported_isas(dtype)[::-1]
        if EMULATED in isas and dtype == "float32":  # products in three parts, which take long
            isas.remove(EMULATED)
            isas.append(pytest.param(EMULATED, marks=pytest.mark.slow))
        metafunc.parametrize("isa", isas)


@pytest.fixture(autouse=True)
def same_start(request):
    """Each test starts from the same seed and settings, whatever the one before it has set.

    One thread, so that the tests run well on a busy machine too. test_invariance.py shows that
    more threads compute the same bits, also more of them than this machine has processors.
    """
    seed(0)
    set_threads(1)
    _C.force_partition("chosen", oversubscribe=True)
    torch.set_flush_denormal(False)
    case = getattr(request.node, "callspec", None)
    isa = case.params.get("isa", "") if case else ""
    _C.force_isa(isa)
    # Of layers of every size, also of those that are too small for it otherwise.
    _C.force_float32_parts(3 if isa == EMULATED else -1)


@pytest.fixture
def compiler():
    found = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if found is None:
        pytest.skip("no compiler here")
    return found


@pytest.fixture
def python():
    """Run code, or arguments of the interpreter, in a fresh process; its standard output."""

    # Not in the repository's root, where a bare `rnnfast/` would hide the installed package.
    def run(code: str | list[str], check: bool = True, timeout: int = 120, **environment: str):
        arguments = ["-c", code] if isinstance(code, str) else code
        process = subprocess.run(
            [sys.executable, *arguments],
            env=os.environ | environment,
            cwd=SUPPORT,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check:
            assert process.returncode == 0, process.stdout + process.stderr
        return process

    return run


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """The emulated extension, built once for all of pytest's workers, and again if a source changes."""
    folder = tmp_path_factory.getbasetemp().parent / f"cuda_on_cpu-{cuda_on_cpu.digest()}"
    return cuda_on_cpu.load(made_once(folder, cuda_on_cpu.build) / "_cuda.so")
