"""Beyond torch.nn."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from twins import flatten

from .items import (
    LAYERS,
    build,
    close,
    compiled,
    example,
    first,
    item,
    weight,
)

MORE = "Beyond torch.nn"


@item(MORE, "dropout between layers: torch's masks for a seed", LAYERS)
def masks(package, kind):
    results = []
    for own in (package, nn):
        module, x = build(own, kind, 5, 7, num_layers=3, dropout=0.5), torch.ones(4, 3, 5)
        torch.manual_seed(1)
        results.append((*flatten(module(x)), torch.rand(1)))
    close(*results)


@item(
    MORE,
    "a weight whose `.data` was replaced by a smaller one is refused",
    unsafe="LSTM reads out of bounds",
)
def too_small(package, kind):
    module = build(package, kind)
    w = getattr(module, weight(kind))
    w.data = w.data[:3].clone()
    with pytest.raises(RuntimeError):
        module(example(kind))


@item(MORE, "`reset=`: states zeroed inside a sequence, forward and backward", LAYERS)
def resets(package, kind):
    module, x = build(package, kind), example(kind, 6)
    reset = torch.zeros(6, 3, dtype=torch.bool)
    reset[3] = True
    halves = [first(module(part)) for part in (x[:3], x[3:])]
    y = first(module(x, reset=reset))
    close(y, torch.cat(halves))
    got, want = (
        torch.autograd.grad(out.square().sum(), list(module.parameters()))
        for out in (y, torch.cat(halves))
    )
    close(got, want)


@item(MORE, "`return_cell_states=`: every step's c", ("LSTM",))
def every_c(package, kind):
    module, x = build(package, kind), example(kind)
    _, _, cells = module(x, return_cell_states=True)
    close(cells, torch.cat([module(x[: t + 1])[1][1] for t in range(4)]))


@item(MORE, "`lengths=` for a padded batch, without packing", LAYERS)
def with_lengths(package, kind):
    module, x = build(package, kind), example(kind)
    y = first(module(x, lengths=torch.tensor([2, 4, 1])))
    close(y[:2, 0], first(module(x[:2, :1]))[:, 0])
    assert not y[2:, 0].any()


@item(MORE, "... in `torch.compile(fullgraph=True)`, any in two compilations", LAYERS)
def with_lengths_compiled(package, kind):
    from torch._dynamo.testing import CompileCounterWithBackend

    module, counter = build(package, kind), CompileCounterWithBackend("aot_eager")
    run = compiled(module, counter)
    for lengths in ([2, 4, 1], [3, 3], [9, 1, 2, 5], [6, 7], [1, 1, 8, 2, 2]):
        x = example(kind, max(lengths) + 1, len(lengths))
        given = torch.tensor(lengths)
        close(run(x, lengths=given), module(x, lengths=given), 0, 0)
    assert counter.frame_count <= 2, f"{counter.frame_count} compilations"
