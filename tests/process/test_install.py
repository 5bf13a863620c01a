"""`pip install` in fresh environments, where nvcc works, fails or is too old.

Each case is a build, so these run only when asked for, as .ci/run does: `pytest -m slow -s`. The
kernels need minutes to compile. Objects that the build of this checkout has are copied.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("install")]

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc")

# Forward and backward of an LSTM in float64; the last hidden state is compared with the equations'.
USE = """
import numpy as np
import rnnfast.arrays
T, B, I, H = 5, 3, 4, 6
random = np.random.default_rng(0)
x = random.standard_normal((T, B, I))
weights = w_ih, w_hh, b_ih, b_hh = tuple(
    random.standard_normal(s) for s in ((4 * H, I), (4 * H, H), 4 * H, 4 * H)
)
out = rnnfast.arrays.forward("lstm", x, weights, save=True)
h, c = np.zeros((B, H)), np.zeros((B, H))
for step in x:
    i, f, g, o = np.split(step @ w_ih.T + h @ w_hh.T + b_ih + b_hh, 4, axis=1)
    i, f, o = (1 / (1 + np.exp(-gate)) for gate in (i, f, o))
    c = f * c + i * np.tanh(g)
    h = o * np.tanh(c)
np.testing.assert_allclose(out.y[-1], h, rtol=1e-10, atol=1e-12)
grads = out.backward(np.ones_like(out.y))
assert grads.x.shape == x.shape and np.isfinite(grads.w_hh).all()
try:
    import torch
except ImportError:
    print("computed without torch")
"""


def run(*command: object, cwd: Path, **environment: str) -> str:
    """Run a command and show it and its output; `pytest -s` lets a reader see both."""
    print("\n$", *command, flush=True)
    ran = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(ran.stdout, flush=True)
    assert ran.returncode == 0, f"{command} failed:\n{ran.stdout}"
    return ran.stdout


@pytest.fixture(scope="session")
def outside(tmp_path_factory):
    """Variables for a process that sees nothing of the environment of these tests."""
    own = Path(sys.prefix, "bin").resolve()
    path = [f for f in os.environ["PATH"].split(os.pathsep) if Path(f).resolve() != own]
    # A cache of its own, since pip also keeps wheels that it has built.
    cache = tmp_path_factory.mktemp("pip")
    return {"PATH": os.pathsep.join(path), "PIP_CACHE_DIR": str(cache), "PYTHONPATH": ""}


@pytest.fixture
def fresh(tmp_path, outside):
    """The folder of a new environment's programs."""
    run(sys.executable, "-m", "venv", tmp_path / "env", cwd=tmp_path, **outside)
    return tmp_path / "env" / "bin"


def check_use(programs: Path, folder: Path, outside: dict[str, str]) -> str:
    """Compute in an installed package, from a folder that has no sources; what `rnnfast info` says."""
    assert run(programs / "python", "-c", USE, cwd=folder, **outside) == "computed without torch\n"
    return run(programs / "rnnfast", "info", cwd=folder, **outside)


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
    """The files that a clean checkout of this tree would have."""
    folder = tmp_path_factory.mktemp("checkout")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def launcher(tmp_path_factory):
    """Puts copied_objects.py before the C++ compiler."""
    path = tmp_path_factory.mktemp("launcher") / "launcher"
    program = shlex.join([sys.executable, str(ROOT / "tests/support/copied_objects.py"), str(ROOT)])
    path.write_text(f'#!/bin/sh\nexec {program} "$@"\n')
    path.chmod(0o755)
    return {"CMAKE_CXX_COMPILER_LAUNCHER": str(path)}


@pytest.fixture(scope="session")
def sdist(checkout, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    code = f"from scikit_build_core.build import build_sdist; build_sdist({str(folder)!r})"
    run(sys.executable, "-c", code, cwd=checkout)
    (path,) = folder.glob("rnnfast-*.tar.gz")
    return path


def install(sdist: Path, programs: Path, nvcc: str | None, *settings: str, **environment: str) -> str:
    """What pip says when it installs the sdist, with a script in the place of nvcc if there is one."""
    folder = programs.parent / "nvcc"
    folder.mkdir()
    if nvcc is not None:
        (folder / "nvcc").write_text(f"#!/bin/sh\n{nvcc}\n")
        (folder / "nvcc").chmod(0o755)
    environment["PATH"] = f"{folder}{os.pathsep}{environment['PATH']}"
    own = shutil.copy2(
        sdist, programs.parent
    )  # pip knows the wheels that it has built by the sdist's path
    options = [f"--config-settings={setting}" for setting in settings]  # -C needs pip 23.1
    return run(programs / "pip", "install", "-v", own, *options, cwd=programs, **environment)


def test_readme(checkout, fresh, launcher, tmp_path, outside):
    """`pip install .` with this machine's nvcc on PATH, where there is one: CUDA is off."""
    run(fresh / "pip", "install", ".", cwd=checkout, **outside, **launcher)
    assert "CUDA                    not built" in check_use(fresh, tmp_path, outside)


OLD = """case "$*" in
  *c++20*) echo "nvcc fatal   : Value 'c++20' is not defined for option 'std'" >&2; exit 1 ;;
esac
echo 'nvcc: NVIDIA (R) Cuda compiler driver'
echo 'Cuda compilation tools, release 10.2, V10.2.89'"""


# `cmake.version` has pip fetch a new CMake, though this machine has one that is new enough.
@pytest.mark.parametrize(
    ("nvcc", "said", "settings"),
    [
        ("exit 1", "--version` fails: exit status 1", []),
        (OLD, "is nvcc 10.2.89, older than 12.0", ["cmake.version=>=4"]),
    ],
    ids=["fails", "too old"],
)
def test_sdist_beside_a_broken_nvcc(nvcc, said, settings, sdist, fresh, launcher, tmp_path, outside):
    auto = "cmake.define.RNNFAST_CUDA=AUTO"
    printed = install(sdist, fresh, nvcc, auto, *settings, **outside, **launcher)
    assert f"{said}\n" in printed
    assert "CUDA                    not built" in check_use(fresh, tmp_path, outside)


@pytest.mark.skipif(NVCC is None, reason="no nvcc to compile with")
def test_sdist_beside_a_working_nvcc(sdist, fresh, launcher, tmp_path, outside):
    """The kernels of one architecture, hardly optimised: all of them take minutes."""
    architecture = "cmake.define.CMAKE_CUDA_ARCHITECTURES=90-real"
    quick = {"CUDAFLAGS": "-Xcicc -O1 -Xptxas -O1"}
    auto = "cmake.define.RNNFAST_CUDA=AUTO"
    install(sdist, fresh, None, auto, architecture, **outside, **launcher, **quick)
    assert "built; no layer uses it without torch" in check_use(fresh, tmp_path, outside)
