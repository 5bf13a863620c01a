"""What programs do with torch.nn's recurrent modules: each as one function of a package and a class.

`test_drop_in.py` demands all of it of rnnfast. `python -m drop_in` tries it on torch.nn as well and
writes the table in docs/drop-in.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from twins import flatten

LAYERS = ("LSTM", "GRU", "RNN")
ALL = (*LAYERS, "LSTMCell", "GRUCell", "RNNCell")


@dataclass(frozen=True)
class Item:
    section: str
    what: str
    run: Callable[[Any, str], None]
    kinds: tuple[str, ...]
    note: str
    unsafe: str  # what happens with torch.nn, where it must not be tried


ITEMS: list[Item] = []


def item(section: str, what: str, kinds=ALL, note: str = "", unsafe: str = ""):
    def add(run):
        ITEMS.append(Item(section, what, run, kinds, note, unsafe))
        return run

    return add


def build(package, kind, *sizes, **options):
    torch.manual_seed(0)
    return getattr(package, kind)(*(sizes or (5, 7)), **options)


def example(kind, steps=4, batch=3, features=5, **options):
    lead = () if kind.endswith("Cell") else (steps,)
    return torch.randn(*lead, batch, features, **options)


def first(out):
    return flatten(out)[0]


def close(got, want, rtol=1e-4, atol=1e-5):
    torch.testing.assert_close(flatten(got), flatten(want), rtol=rtol, atol=atol)


def loss_of(module, x):
    return sum(o.square().sum() for o in flatten(module(x)))


def gradients(module, x):
    return torch.autograd.grad(loss_of(module, x), list(module.parameters()))


def weights_of(module):
    return {name: p.detach() for name, p in module.named_parameters()}


def compiled(module, backend="aot_eager"):
    torch._dynamo.reset()
    return torch.compile(module, fullgraph=True, backend=backend)


def weight(kind, which="hh"):
    return f"weight_{which}" + ("" if kind.endswith("Cell") else "_l0")


class Net(nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x):
        return self.rnn(x)


def result(item: Item, package) -> str:
    """What the table says: "yes", "no", or for which classes it is no."""
    failed = []
    for kind in item.kinds:
        try:
            item.run(package, kind)
        except ImportError:
            raise
        except Exception:
            failed.append(kind)
    if not failed:
        return "yes"
    return "no" if len(failed) == len(item.kinds) else "not " + ", ".join(failed)
