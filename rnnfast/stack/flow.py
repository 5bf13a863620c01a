"""Who wants to know the norms of the states' gradients, and what backward tells them."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .config import Inputs, StackConfig

__all__ = ["RECORDERS", "Norms", "Recorder", "new_norms", "record"]

#: The norms of dL/dh_t and dL/dc_t, ``[layers, directions, T]`` each; None for cells without a cell
#: state.
Norms = tuple[Tensor, Tensor | None]


class Recorder(Protocol):
    """An open context of :func:`rnnfast.gradient_flow`."""

    def add(self, config: StackConfig, inputs: Inputs, norms: Norms) -> None:
        """Take the norms of one backward call."""


#: The open contexts.
RECORDERS: list[Recorder] = []


def new_norms(config: StackConfig, inputs: Inputs) -> Norms:
    """Memory for the norms of a call, which the kernels write."""
    if inputs.is_packed:
        steps = len(inputs.sizes)  # type: ignore[arg-type]
    else:
        steps = 1 if inputs.is_step else inputs.x.size(1 if config.batch_first else 0)
    shape = (config.layers, config.directions, steps)
    h = torch.empty(shape, dtype=torch.float64, device="cpu")
    return h, torch.empty_like(h) if config.has_c else None


def record(config: StackConfig, inputs: Inputs, norms: Norms) -> None:
    """Give the norms of a call to all open contexts."""
    for recorder in tuple(RECORDERS):
        recorder.add(config, inputs, norms)
