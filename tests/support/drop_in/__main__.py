"""Writes docs/drop-in.md."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from torch import nn

import rnnfast

from . import ITEMS, result


def table() -> str:
    lines: list[str] = []
    section = ""
    for one in ITEMS:
        if one.section != section:
            section = one.section
            lines += ["", f"## {section}", "", "| | torch.nn | rnnfast | |", "| --- " * 4 + "|"]
        theirs = one.unsafe or result(one, nn)
        lines.append(f"| {one.what} | {theirs} | {result(one, rnnfast)} | {one.note} |")
        print(lines[-1], file=sys.stderr)
    return "\n".join(lines) + "\n"


INTRODUCTION = """\
# What a drop-in does

Each line is a test of LSTM, GRU and RNN, and of the cells that have the feature. It runs with
torch.nn's classes and with rnnfast's, on PyTorch {version}, CPU. The tests are in
`tests/support/drop_in/`. `make test` runs every line with rnnfast. `make test-slow` compares the column
of torch.nn. `python -m drop_in`, in `tests/support/`, writes this page.
"""

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    page = Path(__file__).parents[3] / "docs" / "drop-in.md"
    page.parent.mkdir(exist_ok=True)
    page.write_text(INTRODUCTION.format(version=torch.__version__.split("+")[0]) + table())
