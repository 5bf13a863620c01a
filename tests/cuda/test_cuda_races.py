"""No two threads of a CUDA kernel use the same memory without a barrier between them.

The thread sanitizer watches the kernels on the emulated device. To it each emulated thread is a
thread, and only the kernels' own barriers put the accesses of two threads in an order: the barriers of
a block and of a cluster, and the counter of a grid. Products on tensor cores do not.

The control: it must find a race where any one barrier is left out, and in each of MISTAKES.
"""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

import cuda_code
import cuda_races
from cuda_races import FOUND, Edit

pytestmark = pytest.mark.slow

# Every other cell has as many stages as one of these, and a cell state where that has one.
CELLS = ["Lstm", "Gru", "GruOriginal"]
FORWARD, BACKWARD, GROUP = "cuda/forward.h", "cuda/backward.h", "cuda/group.h"

BARRIERS = [(file, edit) for file in (FORWARD, BACKWARD, GROUP) for edit in cuda_races.barriers(file)]

# What is wrong, the launches in which it is, and the edit.
MISTAKES = {
    "h is published in the phase that reads it": (
        "cluster forward",
        Edit(
            FORWARD,
            "      ++phase_;\n      publish(active);",
            "      publish(active);\n      ++phase_;",
        ),
    ),
    "one operand in shared memory": (
        "cluster forward",
        Edit(FORWARD, "plan_.tier == Tier::grid ? 0 : phase_ & 1", "0"),
    ),
    "one operand in device memory": (
        "grid forward",
        Edit(FORWARD, "(phase_ & 1) * static_cast<long>", "0 * static_cast<long>"),
    ),
    "every block publishes the units of the first": (
        "cluster forward",
        Edit(FORWARD, "(to + group_.first_unit)[k]", "(to)[k]"),
    ),
    "gradients are sent in the phase that reads them": (
        "cluster backward",
        Edit(
            BACKWARD,
            "      ++phase_;\n      multiply<stage>(active);",
            "      multiply<stage>(active);\n      ++phase_;",
        ),
    ),
    "one inbox in shared memory": (
        "cluster backward",
        Edit(BACKWARD, "(layout_.inbox) + (phase & 1) * inbox_size_", "(layout_.inbox)"),
    ),
    "one inbox in device memory": (
        "grid backward",
        Edit(BACKWARD, "(phase & 1) * plan_.blocks + rank", "rank"),
    ),
    "every block sends in the parcels of the first": (
        "grid backward",
        Edit(BACKWARD, "(first_parcel + piece)", "(piece)"),
    ),
    "a cluster meets as a block": ("cluster forward", Edit(GROUP, "sync_cluster()", "sync_block()")),
    "a grid waits for one block fewer": (
        "grid backward",
        Edit(GROUP, "static_cast<unsigned>(plan.blocks)", "static_cast<unsigned>(plan.blocks - 1)"),
    ),
    "a grid counts and does not wait": (
        "grid forward",
        Edit(GROUP, "      wait_for(counter_, target_);\n", ""),
    ),
    "a count without its fence": (
        "grid forward",
        Edit(
            "emulator.h",
            "order::release(&counted_[counter].emplace_back())",
            "counted_[counter].emplace_back()",
        ),
    ),
    "a wait that acquires nothing": (
        "grid backward",
        Edit("emulator.h", "order::acquire(&places[i])", "static_cast<void>(i)"),
    ),
}


def test_cells_stand_for_all():
    kinds = {name: (cell.stages, cell.has_c) for name, cell in cuda_code.CLASSES.items()}
    assert {kinds[name] for name in CELLS} == set(kinds.values())


@pytest.fixture(scope="module")
def sanitizing(tmp_path_factory):
    """A compiler with the thread sanitizer."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no compiler here")
    folder = tmp_path_factory.mktemp("sanitizing")
    (folder / "empty.cpp").write_text("int main() {}\n")
    link = [compiler, "-fsanitize=thread", folder / "empty.cpp", "-o", folder / "empty"]
    if subprocess.run(link, capture_output=True).returncode != 0:
        pytest.skip("the compiler comes without the thread sanitizer's runtime")
    return compiler


@pytest.mark.parametrize("numbers", ["Bfloat16 TensorCores", "float Scalars"])
def test_no_race(numbers, sanitizing, tmp_path):
    program = cuda_races.build(sanitizing, tmp_path, numbers, ",".join(CELLS))
    ran = cuda_races.run(program)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[:10000]
    assert ran.stderr == ""
    launches = [line.split() for line in ran.stdout.splitlines()]
    assert len({tuple(launch[:3]) for launch in launches}) == 3 * 2 * len(CELLS)  # tiers, passes
    for tier, most_blocks in {"block": 1, "cluster": 4, "grid": 4}.items():
        sizes = [dict(n.split("=") for n in launch[3:]) for launch in launches if launch[0] == tier]
        assert {size["packed"] for size in sizes} == {"0", "1"}
        assert max(int(size["blocks"]) for size in sizes) == most_blocks
        assert any(int(size["chunk"]) < int(size["rows"]) for size in sizes) == (tier == "grid")


def finds(compiler, folder, edit, launches):
    program = cuda_races.build(compiler, folder, "float Scalars", "Gru", edit)
    for only in launches:
        ran = cuda_races.run(program, *only.split(), halt_on_error=1, symbolize=0)
        assert ran.stdout, f"no launch of {only}"
        if ran.returncode == FOUND:
            assert "WARNING: ThreadSanitizer: data race" in ran.stderr
            return True
        assert ran.returncode == 0, ran.stderr[:10000]
    return False


@pytest.mark.parametrize(
    ("file", "edit"), BARRIERS, ids=[f"{file}-{i}" for i, (file, _) in enumerate(BARRIERS)]
)
def test_race_without_a_barrier(file, edit, sanitizing, tmp_path):
    """Every barrier of the kernels is needed on some tier."""
    kernels = "backward" if file == BACKWARD else "forward"
    assert finds(
        sanitizing, tmp_path, edit, [f"{tier} {kernels}" for tier in ("grid", "cluster", "block")]
    )


def test_all_barriers_are_left_out():
    """The list above has every barrier in the sources."""
    sources = cuda_races.ROOT / "csrc/cuda"
    names = re.findall(
        r"\b(?:sync_block|sync_cluster|group_\.sync)\(\)",
        "".join(path.read_text() for path in sources.glob("*.h") if path.name != "device.h"),
    )
    assert len(BARRIERS) == len(names) == 14


@pytest.mark.parametrize(("only", "edit"), MISTAKES.values(), ids=MISTAKES)
def test_race_after_a_mistake(only, edit, sanitizing, tmp_path):
    assert finds(sanitizing, tmp_path, edit, [only])
