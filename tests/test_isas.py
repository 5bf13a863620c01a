"""Everything numerical, once more in each instruction set that this machine has."""

from __future__ import annotations

import os

import pytest

from rnnfast import _C

OTHERS = [isa for isa in _C.supported_isas() if isa != _C.isa()]


@pytest.mark.numerics
def test_runs_in_the_instruction_set_that_was_asked_for():
    assert _C.isa() == (os.environ.get("RNNFAST_ISA") or _C.isa())
    assert _C.isa() in _C.supported_isas()


@pytest.mark.parametrize("isa", OTHERS)
def test_numerics(python, isa):
    arguments = ["-m", "pytest", "-m", "numerics", "--tb=short", "-p", "no:cacheprovider", "."]
    process = python(arguments, check=False, timeout=2400, RNNFAST_ISA=isa)
    assert process.returncode == 0, process.stdout[-8000:] + process.stderr[-2000:]
    assert "passed" in process.stdout
