"""How many threads a call has after one whose threads were kept off their cores."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


@pytest.mark.skipif(COMPILER is None, reason="no compiler here")
def test_fewer_threads_only_where_that_is_faster(tmp_path):
    program = tmp_path / "driver"
    source = ROOT / "tests/crowd/driver.cpp"
    subprocess.run(
        [COMPILER, "-std=c++20", "-O1", "-I", ROOT / "csrc", source, "-o", program, "-pthread"],
        check=True,
    )
    run = subprocess.run([program], capture_output=True, text=True, check=True)
    found = dict(line.split() for line in run.stdout.splitlines())
    assert found == {"before": "2", "short": "1", "later": "2", "long": "2"}
