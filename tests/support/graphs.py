"""The graphs that torch.compile makes, and whether they compute the same bits."""

from __future__ import annotations

import torch
from torch._dynamo.testing import CompileCounterWithBackend

from twins import flatten


def recorded(backend="aot_eager"):
    """A backend, and the names of our operators in the graphs that it was given."""
    counter = CompileCounterWithBackend(backend)

    def names():
        nodes = [n for graph in counter.graphs for n in graph.graph.nodes]
        return [str(n.target) for n in nodes if "rnnfast" in str(n.target)]

    return counter, names


def same(got, want):
    got, want = flatten(got), flatten(want)
    assert len(got) == len(want)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
