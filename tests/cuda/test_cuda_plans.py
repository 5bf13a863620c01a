"""The extension _cuda by itself, on an emulated device: what it refuses, and who computes what."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import reference
import rnnfast
from rnnfast.stack.config import CELLS

GATES = {name: cell.gates for name, cell in reference.CELLS.items()}


def tensors(device, T=3, B=2, H=8):
    """What Plan.run gets for a forward GRU."""
    shapes = [(T, B, 3 * H), (3 * H, H), (3 * H,), (B, H), None, (T, B, H), None, None, (B, H), None]
    return [None if s is None else torch.zeros(s, device=device) for s in shapes]


@pytest.mark.parametrize(
    ("at", "change", "error"),
    [
        (0, lambda t: t[:2], "products has shape .2, 2, 24.; expected .3, 2, 24."),
        (0, lambda t: t.double(), "products has dtype float64; expected float32"),
        (0, lambda t: None, "products must not be None"),
        (1, lambda t: t[:, :7], "w_hh has shape .24, 7.; expected .24, 8."),
        (1, lambda t: t.t().contiguous().t(), "w_hh must have its last dimension contiguous"),
        (2, lambda t: t[:8], "b_hh has shape .8,.; expected .24,."),
        (3, lambda t: t[:1], "h0 has shape .1, 8.; expected .2, 8."),
        (5, lambda t: t[:, :1], "y has shape .3, 1, 8.; expected .3, 2, 8."),
        (5, lambda t: t[:1].expand(3, 2, 8), "y cannot be used: its elements share memory"),
        (7, lambda t: torch.zeros(3, 2, 8), "gates has shape .3, 2, 8.; expected .3, 2, 32."),
        (8, lambda t: t[0], "h_n has shape .8,.; expected .2, 8."),
    ],
)
def test_sizes_are_checked(emulated, at, change, error):
    plan = emulated.plan(0, CELLS["gru"].number, "float32", False, False, (8, 2, 1), None)
    given = tensors("cpu")
    given[5].fill_(7)
    plan.run(0, 3, None, None, None, [tuple(given)], None)
    given[5].fill_(7)
    given[at] = change(given[at])
    with pytest.raises((TypeError, ValueError), match=error):
        plan.run(0, 3, None, None, None, [tuple(given)], None)
    assert at == 5 or bool((given[5] == 7).all())


def test_lengths_and_room_are_checked(emulated):
    plan = emulated.plan(0, CELLS["gru"].number, "float32", False, False, (8, 2, 1), None)
    given = tuple(tensors("cpu"))
    room, first = torch.zeros(8, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
    for sizes, error in [
        ([2, 3], "never grow; entry 1 is 3"),
        ([2, 0], "entry 1 is 0"),
        ([3, 1], "begin with 3; the plan is for 2 rows"),
        ([2, 1], "first has shape .2,.; expected .3,."),
    ]:
        with pytest.raises(ValueError, match=error):
            plan.run(0, 2, torch.tensor(sizes), first, None, [given], None)
    with pytest.raises(TypeError, match="first has dtype uint8; expected int64"):
        plan.run(0, 2, torch.tensor([2, 1]), room, None, [given], None)
    with pytest.raises(ValueError, match="got 2 directions; the plan is for 1"):
        plan.run(0, 3, None, None, None, [given, given], None)
    with pytest.raises(ValueError, match="reset has shape"):
        plan.run(0, 3, None, None, torch.zeros(2, 3, dtype=torch.bool), [given], None)
    grid = emulated.plan(0, CELLS["gru"].number, "float32", False, False, (8, 2, 1), "grid")
    with pytest.raises(ValueError, match="workspace must be"):
        grid.run(0, 3, None, None, None, [given], room)
    with pytest.raises(ValueError, match="tier is 'warp'; expected"):
        emulated.plan(0, CELLS["gru"].number, "float32", False, False, (8, 2, 1), "warp")


def test_stub_names_what_the_module_has(emulated):
    tree = ast.parse((Path(rnnfast.__file__).parent / "_cuda.pyi").read_text())
    kinds = (ast.FunctionDef, ast.ClassDef)
    assert {node.name for node in tree.body if isinstance(node, kinds)} == {
        name for name in dir(emulated) if not name.startswith("_")
    }
    (plan,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Plan")
    assert {node.name for node in plan.body if isinstance(node, kinds)} == {
        name for name in dir(emulated.Plan) if not name.startswith("_")
    }


def test_plans_fit_the_device(emulated, monkeypatch):
    """Every plan of a device of an H200's size keeps to its limits and covers its layer."""
    monkeypatch.setenv("RNNFAST_EMULATED_MULTIPROCESSORS", "132")
    facts = emulated.device(0)
    assert facts["multiprocessors"] == 132
    seen = set()
    for cell in range(len(CELLS)):
        for hidden in (1, 7, 64, 128, 200, 256, 512, 768, 1024, 1500):
            for batch in (1, 8, 33, 128, 1000):
                for backward in (False, True):
                    for directions in (1, 2):
                        sizes = hidden, batch, directions
                        plan = emulated.plan(0, cell, "bfloat16", False, backward, sizes, None)
                        if plan is None:
                            continue
                        seen.add(plan.tier)
                        assert plan.shared_bytes <= facts["shared_bytes"]
                        assert plan.blocks * plan.units >= hidden > (plan.blocks - 1) * plan.units
                        assert plan.groups * plan.rows >= batch > (plan.groups - 1) * plan.rows
                        if plan.tier == "cluster":
                            assert plan.blocks in (2, 4, 8, 16)
                        if plan.tier == "grid":
                            assert plan.blocks * plan.groups * directions <= 132
    assert seen == {"block", "cluster", "grid"}


@pytest.mark.parametrize(
    ("cell", "dtype", "hidden", "tier"),
    [
        ("lstm", "bfloat16", 64, "block"),
        ("lstm", "bfloat16", 128, "block"),
        ("lstm", "bfloat16", 256, "cluster"),
        ("lstm", "bfloat16", 512, "cluster"),
        ("gru", "bfloat16", 512, "cluster"),
        ("lstm", "bfloat16", 1024, "grid"),
        ("gru", "bfloat16", 1024, "grid"),
        ("lstm", "float32", 256, "cluster"),
        ("gru", "float32", 1024, "grid"),
    ],
)
@pytest.mark.parametrize("backward", [False, True])
def test_tiers(cell, dtype, hidden, tier, backward, emulated, monkeypatch):
    """docs/design.md's table, on a device of an H200's size."""
    monkeypatch.setenv("RNNFAST_EMULATED_MULTIPROCESSORS", "132")
    plan = emulated.plan(0, CELLS[cell].number, dtype, False, backward, (hidden, 8, 1), None)
    assert plan is not None
    assert plan.tier == tier
