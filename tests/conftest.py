from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from rnnfast import _C

# The same examples at every run: a failure here is a failure everywhere.
settings.register_profile("rnnfast", derandomize=True, deadline=None, database=None)
settings.load_profile("rnnfast")

HERE = Path(__file__).parent


def pytest_configure(config):
    for marker in (
        "numerics: depends on the instruction set; test_isas.py runs it in each of them",
        "install: builds the whole package, for minutes; .ci/run runs it",
    ):
        config.addinivalue_line("markers", marker)


@pytest.fixture(autouse=True)
def same_start():
    """Each test starts from the same seed and settings, whatever the one before it has set.

    One thread, so that the tests run well on a busy machine too. test_invariance.py shows that
    more threads compute the same bits, also more of them than this machine has processors.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
    _C.force_partition("chosen", oversubscribe=True)
    torch.set_flush_denormal(False)


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
            cwd=HERE,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check:
            assert process.returncode == 0, process.stdout + process.stderr
        return process

    return run
