"""Precision."""

from __future__ import annotations

import torch
from torch import nn

from twins import flatten

from .items import (
    build,
    close,
    example,
    gradients,
    item,
)

PRECISION = "Precision"


def under_autocast(package, kind, dtype):
    module, x = build(package, kind), example(kind)
    want = (*flatten(module(x)), *gradients(module, x))
    with torch.autocast("cpu", dtype):
        out = flatten(module(x))
    if kind in ("LSTM", "RNN"):  # torch computes the other formulas in the state's dtype
        assert out[0].dtype == dtype
    total = sum(o.float().square().sum() for o in out)
    got = (*(o.float() for o in out), *torch.autograd.grad(total, list(module.parameters())))
    close(got, want, 0.05, 0.05)


@item(
    PRECISION,
    '`torch.autocast("cpu")`, forward and backward',
    unsafe="LSTM: on processors with AVX-512",
)
def autocasts(package, kind):
    under_autocast(package, kind, torch.bfloat16)


@item(
    PRECISION,
    '`torch.autocast("cpu", torch.float16)`',
    note="computed in float32",
    unsafe="LSTM: on few processors",
)
def autocasts_to_half(package, kind):
    under_autocast(package, kind, torch.float16)


@item(PRECISION, "`double()`, `bfloat16()`, `half()` modules, training")
def dtypes(package, kind):
    for dtype, bound in ((torch.float64, 1e-9), (torch.bfloat16, 0.05), (torch.float16, 0.01)):
        wide, x = build(nn, kind).double(), example(kind, dtype=torch.float64)
        module = build(package, kind).to(dtype)
        wide.load_state_dict(module.state_dict())
        got = (*flatten(module(x.to(dtype))), *gradients(module, x.to(dtype)))
        want = (*flatten(wide(x.to(dtype).double())), *gradients(wide, x.to(dtype).double()))
        assert all(t.dtype == dtype for t in got)
        scale = max(float(t.abs().max()) for t in want)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=bound, atol=bound * scale)


@item(PRECISION, "input and weights of different dtypes: torch's exception")
def mixed(package, kind):
    raised = []
    for own in (package, nn):
        try:
            build(own, kind)(example(kind, dtype=torch.float64))
        except Exception as error:
            raised.append((type(error), str(error)))
    assert len(raised) == 2
    assert raised[0] == raised[1]
