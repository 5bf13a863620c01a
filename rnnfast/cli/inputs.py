"""Random inputs of a recurrent module, for the commands that compare modules and time them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["ModuleInputs", "random_inputs"]


class ModuleInputs(NamedTuple):
    """What a call reads, and the gradient of its output, all of the module's dtype."""

    x: Tensor  # [T, B, I]; [B, T, I] with batch_first; packed [rows, I]
    states: tuple[Tensor, ...]  # h and, for an LSTM, c: [layers * directions, B, .]; of a cell [B, .]
    dy: Tensor  # of the output's shape


def random_inputs(
    module: nn.RNNBase | nn.RNNCellBase, steps: int, batch: int, rows: int = 0
) -> ModuleInputs:
    """Normal random numbers from torch's default generator.

    Args:
        module: of torch.nn or rnnfast.
        steps: T.
        batch: B.
        rows: of a packed sequence; 0 means a padded one.

    """
    dtype, hidden = next(module.parameters()).dtype, module.hidden_size
    outputs = getattr(module, "proj_size", 0) or hidden
    leading = (rows,) if rows else (steps, batch)
    layers: tuple[int, ...] = ()
    directions = 1
    if isinstance(module, nn.RNNBase):
        directions = 2 if module.bidirectional else 1
        layers = (module.num_layers * directions,)
        if module.batch_first and not rows:
            leading = (batch, steps)
    widths = (outputs, hidden) if isinstance(module, nn.LSTM | nn.LSTMCell) else (outputs,)
    return ModuleInputs(
        torch.randn(*leading, module.input_size, dtype=dtype),
        tuple(torch.randn(*layers, batch, width, dtype=dtype) for width in widths),
        torch.randn(*leading, directions * outputs, dtype=dtype),
    )
