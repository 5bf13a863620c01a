"""Packed sequences, and the same rows one by one."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from seeds import seed
from twins import flatten

# unsorted, with ties; one row; all alike; one long row among many short ones
LENGTHS = [[3, 1, 7, 7, 2], [4], [5, 5, 5], [1] * 20 + [30] + [2] * 19]


def packed(x, lengths):
    return pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)


def run_packed(module, x, state, lengths):
    y, final = module(packed(x, lengths), state)
    return [pad_packed_sequence(y)[0], *flatten(final)]


def run_rows(run, x, state, lengths):
    """Each row alone, put together as a padded batch."""
    columns = [[], *([] for _ in flatten(state))]
    for row, length in enumerate(lengths):
        alone = [h[:, row : row + 1] for h in flatten(state)]
        y, *finals = run(x[:length, row : row + 1], alone)
        missing = (0, 0, 0, 0, 0, len(x) - length)
        columns[0].append(nn.functional.pad(y, missing))
        for column, final in zip(columns[1:], finals, strict=True):
            column.append(final)
    return [torch.cat(column, 1) for column in columns]


def gradients(module, outputs, x, state):
    seed(5)
    weights = [torch.randn(o.shape, dtype=torch.float64).to(o.dtype) for o in outputs]
    loss = sum((o * w).sum() for o, w in zip(outputs, weights, strict=True))
    return torch.autograd.grad(loss, [x, *flatten(state), *module.parameters()])
