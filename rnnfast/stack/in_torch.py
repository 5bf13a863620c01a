"""A stack of layers in torch's own recurrent operator, which cuDNN computes on a GPU."""

from __future__ import annotations

from typing import Any

import torch

from . import reference
from .config import Inputs, Outputs, StackConfig


def stack(config: StackConfig, inputs: Inputs) -> Outputs:
    """As :func:`reference.stack`, which computes what torch's operator does not."""
    x, h0, c0, weights, sizes, reset = inputs
    is_own = config.cell_states or reset is not None or inputs.is_step
    is_padded = sizes is not None and not inputs.is_packed
    if is_own or is_padded or config.projected or not config.is_in_torch:
        return reference.stack(config, inputs)
    batch = int(sizes[0]) if sizes is not None else x.size(0 if config.batch_first else 1)
    shape = (config.layers * config.directions, batch, config.widths(weights)[1])
    states = [x.new_zeros(shape) if s is None else s for s in ((h0, c0) if config.has_c else (h0,))]
    hx: Any = states if config.has_c else states[0]
    # No dropout. In training mode cuDNN keeps what its backward needs.
    options = (config.bias, config.layers, 0.0, torch.is_grad_enabled(), config.directions == 2)
    operator = getattr(torch._VF, config.cell)
    if sizes is None:
        y, *states_n = operator(x, hx, list(weights), *options, config.batch_first)
    else:
        y, *states_n = operator(x, sizes, hx, list(weights), *options)
    return Outputs(y, states_n[0], states_n[1] if config.has_c else None)
