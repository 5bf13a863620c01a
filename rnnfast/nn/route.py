"""From a module to the kernels: precision, route, and dropout between layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..compilers import operator
from ..stack import autograd, checks, precision, reference
from ..stack.config import Inputs, Outputs, StackConfig
from ..stack.precision import Precision


def recurrent_in(
    chosen: Precision | None, config: StackConfig, inputs: Inputs, **options: Any
) -> Outputs | None:
    """:func:`recurrent` in the dtypes of ``chosen``; None means the dtype of the tensors."""
    device = inputs.x.device.type
    if chosen is None or (chosen.compute == chosen.h and not precision.autocasts(device)):
        return recurrent(config, inputs, **options)

    def cast(t: Any, dtype: torch.dtype) -> Any:
        return t if t is None else t.to(dtype)

    inputs = inputs.with_tensors(cast(t, chosen.compute) for t in inputs.tensors)
    with torch.autocast(device, enabled=False):
        outputs = recurrent(config, inputs, **options)
    if outputs is None:
        return None
    h, c = chosen.h, chosen.c
    return Outputs(*(cast(t, d) for t, d in zip(outputs[:4], (h, h, c, c), strict=True)))


def recurrent(
    config: StackConfig,
    inputs: Inputs,
    *,
    dropout: float = 0.0,
    batch: int | None = None,
    fused: bool = True,
    packed: Any = None,
) -> Outputs | None:
    """Run a stack of layers, as torch's ``_VF.lstm``, ``_VF.gru`` and ``_VF.rnn_tanh`` do.

    Returns None if the kernels do not take the inputs.

    Args:
        config: the stack.
        inputs: as :class:`Inputs` describes them.
        dropout: the probability of dropout on the outputs of each layer but the last.
        batch: ``sizes[0]`` of a packed ``x``, for a graph.
        fused: False means in torch's operators, which torch can differentiate in every way.
        packed: the packed weights for a call without gradients and without dropout, or None.

    """
    run: Callable[..., Outputs | None] = autograd.stack if fused else reference.stack
    if fused and checks.traced():
        run = partial(operator.stack, batch=batch)
    if dropout == 0 or config.layers == 1:
        return run(config, inputs) if packed is None else autograd.stack(config, inputs, packed)
    x, h0, c0, weights, sizes, reset = inputs
    layer_config = config._replace(layers=1, batch_first=False, cell_states=False)
    layer_weights = config.weights_per_direction * config.directions
    is_transposed = config.batch_first and x.dim() == 3
    # Time first, as in torch: the same seed gives the same dropout masks.
    y = x.transpose(0, 1) if is_transposed else x
    reset = reset.transpose(0, 1) if is_transposed and reset is not None else reset
    cell_states = None
    h_n: list[Tensor] = []
    c_n: list[Tensor] = []
    for k in range(config.layers):
        part = slice(k * config.directions, (k + 1) * config.directions)
        layer = Inputs(
            F.dropout(y, dropout) if k > 0 else y,
            None if h0 is None else h0[part],
            None if c0 is None else c0[part],
            weights[k * layer_weights : (k + 1) * layer_weights],
            sizes,
            reset,
        )
        is_last = k == config.layers - 1
        result = run(layer_config._replace(cell_states=config.cell_states and is_last), layer)
        if result is None:
            return None
        y, h, c, cell_states, _ = result
        h_n += [] if h is None else [h]
        c_n += [] if c is None else [c]
    if is_transposed:
        y = y.transpose(0, 1)
        cell_states = cell_states if cell_states is None else cell_states.transpose(0, 1)
    return Outputs(y, torch.cat(h_n), torch.cat(c_n) if c_n else None, cell_states)
