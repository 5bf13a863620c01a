"""A frozen module, and whether it notices that its weights have changed."""

from __future__ import annotations

import copy

import torch

import rnnfast
from rnnfast.stack import packed_weights
from seeds import seed
from twins import flatten


def outputs(module, x):
    with torch.no_grad():
        return flatten(module(x))


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def lstm(**options):
    """Its weights are matrices all, as one optimizer wants them."""
    seed(3)
    return rnnfast.LSTM(5, 17, bias=False, **options)


def frames():
    """Two steps: the first one's h is zero."""
    return torch.randn(2, 2, 5)


def kept(module):
    """What a frozen module keeps from call to call."""
    held = packed_weights.HELD[module]
    return held.converted if torch.is_autocast_enabled("cpu") else held.copy


def assert_noticed(module, change, times=2, held=True):
    """After each change a frozen module computes what an unfrozen copy of it does."""
    x = frames()
    with torch.no_grad(), rnnfast.frozen(module):
        for _ in range(times):
            before = outputs(module, x)
            with torch.enable_grad():
                change(module)
            x = x.to(module.weight_ih_l0.dtype)
            got = outputs(module, x)
            assert same(got, outputs(copy.deepcopy(module), x))
            assert not torch.equal(got[0], before[0].to(got[0].dtype)), "the change changes nothing"
        fresh = kept(module)
        outputs(module, x)
        assert kept(module) is fresh
        assert fresh or not held
