"""The configuration of a stack of layers, and the inputs and outputs of a call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cell_table import CELLS

__all__ = ["CELLS", "Inputs", "Outputs", "StackConfig", "output_shapes", "stack_config"]


class StackConfig(NamedTuple):
    """The configuration of a stack of layers: everything but its tensors."""

    cell: str
    layers: int = 1
    directions: int = 1
    bias: bool = True
    projected: bool = False  # whether h is a projection, with the weight w_hr
    batch_first: bool = False
    cell_states: bool = False  # whether to return the cell states of every step
    precision: int = 0  # of products in float32, :func:`precision.float32_setting`

    @property
    def has_c(self) -> bool:
        """Whether the cell has a cell state. False for an unknown cell, which torch has to refuse."""
        return self.cell in CELLS and CELLS[self.cell].has_c

    @property
    def is_in_torch(self) -> bool:
        """Whether torch has an operator for the cell, which cuDNN computes on a GPU."""
        return hasattr(torch._VF, self.cell)

    @property
    def weights_per_direction(self) -> int:
        """How many weights one direction of one layer has."""
        return (4 if self.bias else 2) + self.projected

    def weights(self, flat: Sequence[Any], number: int) -> tuple[Any, Any, Any, Any, Any]:
        """w_ih, w_hh, b_ih, b_hh and w_hr of one direction of one layer; None for a missing one."""
        w = flat[number * self.weights_per_direction : (number + 1) * self.weights_per_direction]
        return w[0], w[1], *(w[2:4] if self.bias else (None, None)), w[-1] if self.projected else None

    def widths(self, flat: Sequence[Tensor]) -> tuple[int, int]:
        """``(R, H)``: the widths of h and of the cell. Without a projection both are H."""
        outputs = flat[1].size(-1)
        return outputs, flat[self.weights_per_direction - 1].size(-1) if self.projected else outputs


#: A StackConfig from a cache, for calls with little overhead. torch.compile does not trace caches.
stack_config = cache(StackConfig)


class Inputs(NamedTuple):
    """The inputs of a call, in the order that all functions use."""

    #: ``[T, B, I]``; ``[B, T, I]`` with ``batch_first``; packed ``[rows, I]``; ``[B, I]`` for one step
    #: of one layer.
    x: Tensor
    #: ``[layers * directions, B, R]``, or ``[B, R]`` for a step; None means zeros.
    h0: Tensor | None
    #: As h0, with H instead of R; None means zeros, or that the cell has no cell state.
    c0: Tensor | None
    #: Flat, in torch's order: for each layer and direction w_ih, w_hh, b_ih, b_hh, w_hr.
    weights: Sequence[Any]
    #: int64 on the CPU. None: every row has T steps. For a packed ``x``: torch's ``batch_sizes [T]``.
    #: For a padded ``x``: the length of each row, ``[B]``.
    sizes: Tensor | None = None
    #: bools with the shape of ``x`` without its last dimension. True: the row's states are zero before
    #: the computation of this step.
    reset: Tensor | None = None

    @property
    def is_packed(self) -> bool:
        """Whether ``x`` is the data of a PackedSequence."""
        return self.sizes is not None and self.x.dim() == 2

    @property
    def is_step(self) -> bool:
        """Whether this is one step of one layer."""
        return self.sizes is None and self.x.dim() == 2

    @property
    def tensors(self) -> tuple[Any, ...]:
        """``(x, h0, c0, *weights)``: the tensors that can have gradients."""
        return (self.x, self.h0, self.c0, *self.weights)

    def with_tensors(self, tensors: Iterable[Any]) -> Inputs:
        """A copy whose :attr:`tensors` are replaced by ``tensors``."""
        x, h0, c0, *weights = tensors
        return self._replace(x=x, h0=h0, c0=c0, weights=weights)


class Outputs(NamedTuple):
    """The outputs of a call."""

    y: Tensor  # layout of x, with directions * R features
    h_n: Tensor | None  # shape of h0; None for a single step, where y is h_n
    c_n: Tensor | None  # shape of c0; None for cells without a cell state
    cell_states: Tensor | None = None  # of the last layer; layout of x, with directions * H features
    saved: Tensor | None = None  # bytes that backward needs; None without gradients


def output_shapes(config: StackConfig, inputs: Inputs, batch: Any = None) -> list[Any]:
    """The shapes of y, h_n, c_n and the cell states; None for an output that the call does not have.

    ``batch`` is the number of rows in the first step of a packed ``x``.
    """
    outputs, hidden = config.widths(inputs.weights)
    leading, is_step = inputs.x.shape[:-1], inputs.is_step
    if not inputs.is_packed:
        batch = leading[0 if config.batch_first or is_step else 1]
    states = (batch,) if is_step else (config.layers * config.directions, batch)
    return [
        (*leading, config.directions * outputs),
        None if is_step else (*states, outputs),
        (*states, hidden) if config.has_c else None,
        (*leading, config.directions * hidden) if config.cell_states and config.has_c else None,
    ]
