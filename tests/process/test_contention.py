"""How many threads a call has after one whose threads were kept off their cores."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_fewer_threads_only_where_that_is_faster(compiler, tmp_path):
    program = tmp_path / "driver"
    source = ROOT / "tests/support/contention/driver.cpp"
    subprocess.run(
        [compiler, "-std=c++20", "-O1", "-I", ROOT / "csrc", source, "-o", program, "-pthread"],
        check=True,
    )
    run = subprocess.run([program], capture_output=True, text=True, check=True)
    found = dict(line.split() for line in run.stdout.splitlines())
    assert found == {"before": "2", "short": "1", "later": "2", "long": "2"}
