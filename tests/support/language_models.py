"""Random language models, and generate and beam_search by their native and by their Python loops."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from cell_modules import CELLS
from rnnfast.generation.model import LanguageModel


def model_of(
    cell="lstm", classes=23, hidden=19, layers=2, dtype=torch.float64, one_hot=False, **options
):
    """Random modules whose choices are not nearly certain."""
    make, cell_options = CELLS[cell]
    inputs = classes if one_hot else 11
    rnn = make(inputs, hidden, layers, **cell_options, **options)
    embedding = None if one_hot else nn.Embedding(classes, inputs)
    head = nn.Linear(cell_options.get("proj_size", hidden), classes)
    nn.init.normal_(head.weight, std=1.5)
    model = nn.ModuleList([m for m in (embedding, rnn, head) if m is not None]).to(dtype)
    return (*([None] if one_hot else []), *model)


def prompt_of(batch=5, length=3, classes=23):
    return torch.randint(classes, (batch, length))


def natively(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return function(*args, **kwargs)


def in_python(monkeypatch, function, *args, **kwargs):
    """The same call by the loop in Python."""
    with monkeypatch.context() as patch:
        patch.setattr(LanguageModel, "why_not", lambda self: "the test says so")
        with pytest.warns(UserWarning, match="runs in Python: the test says so"):
            return function(*args, **kwargs)


def same(a, b, atol=1e-9):
    for x, y in zip(a, b, strict=True):
        states = zip(x, y, strict=True) if isinstance(x, tuple) else [(x, y)]
        for s, t in states:
            torch.testing.assert_close(s, t, atol=atol, rtol=atol)
