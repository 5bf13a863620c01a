"""Padded batches whose rows differ in length."""

from __future__ import annotations

import pytest
import torch

from reference import CELLS
from twins import flatten, states

every_cell = pytest.mark.parametrize("cell", CELLS)

STACKS = [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}, {"bias": False}]
every_stack = pytest.mark.parametrize("options", STACKS, ids=str)

# unsorted, with ties; one row; all alike; one long row among many; empty rows; nothing but those
LENGTHS = [[3, 1, 7, 7, 2], [4], [5, 5, 5], [1] * 20 + [30] + [2] * 19, [0, 3, 0, 9], [0, 0]]


def problem(cell, module, lengths, extra=2):
    """A padded batch, longer than its longest row, with NaN past the ends; and states."""
    dtype = module.weight_ih_l0.dtype
    x = torch.randn(max(lengths) + extra, len(lengths), module.input_size, dtype=dtype)
    for row, length in enumerate(lengths):
        x[length:, row] = torch.nan
    x = x.transpose(0, 1).contiguous() if module.batch_first else x
    count = module.num_layers * (2 if module.bidirectional else 1)
    state = flatten(states(cell, count, len(lengths), module.hidden_size, dtype=dtype))
    return x.requires_grad_(), [h.requires_grad_() for h in state]


def hx(cell, state):
    return tuple(state) if CELLS[cell].has_c else state[0]
