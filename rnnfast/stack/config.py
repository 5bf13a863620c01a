"""What a stack of layers is, what a call of it reads, and what it returns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor

from .cell_table import CELLS

__all__ = ["CELLS", "Inputs", "Outputs", "StackConfig", "output_shapes", "stack_config"]


class StackConfig(NamedTuple):
    """What a stack of layers is, beside its tensors, and what it returns."""

    cell: str
    layers: int = 1
    directions: int = 1
    bias: bool = True
    projected: bool = False  # whether h is a projection, with the weight w_hr
    batch_first: bool = False
    cell_states: bool = False  # whether to return those of every step

    @property
    def has_c(self) -> bool:
        """Whether the stack carries a cell state. No cell has the name where torch has to refuse it."""
        return self.cell in CELLS and CELLS[self.cell].has_c

    @property
    def weights_each(self) -> int:
        """How many weights one direction of one layer has."""
        return (4 if self.bias else 2) + self.projected

    def weights(self, flat: Sequence[Any], number: int) -> tuple[Any, Any, Any, Any, Any]:
        """w_ih, w_hh, b_ih, b_hh and w_hr of one direction of one layer, or None in their place."""
        w = flat[number * self.weights_each : (number + 1) * self.weights_each]
        return w[0], w[1], *(w[2:4] if self.bias else (None, None)), w[-1] if self.projected else None

    def widths(self, flat: Sequence[Tensor]) -> tuple[int, int]:
        """Of h and of the cell: R and H, which are the same unless h is projected."""
        outputs = flat[1].size(-1)
        return outputs, flat[self.weights_each - 1].size(-1) if self.projected else outputs


#: The same ones again, where a call must cost little; torch.compile does not like caches.
stack_config = cache(StackConfig)


class Inputs(NamedTuple):
    """What a call of a stack reads, in the order in which it travels everywhere."""

    #: ``[T, B, I]``; ``[B, T, I]`` with ``batch_first``; packed ``[rows, I]``; ``[B, I]`` for one step
    #: of one layer.
    x: Tensor
    #: ``[layers * directions, B, R]``, or ``[B, R]`` for a step; None means zeros.
    h0: Tensor | None
    #: The same with H in the place of R; None means zeros, or that the cell has no cell state.
    c0: Tensor | None
    #: Flat, in torch's order: for each layer and direction w_ih, w_hh, b_ih, b_hh, w_hr.
    weights: Sequence[Any]
    #: int64 on the CPU. None: every row has every step. For a packed ``x`` torch's ``batch_sizes [T]``,
    #: for a padded one the length of each row ``[B]``.
    sizes: Tensor | None = None
    #: bools of the shape of ``x`` without its features: before which steps a row's states are zero.
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
        """``(x, h0, c0, *weights)``: what has gradients, in the order of the gradients."""
        return (self.x, self.h0, self.c0, *self.weights)

    def with_tensors(self, tensors: Iterable[Any]) -> Inputs:
        """The same with others in the place of :attr:`tensors`."""
        x, h0, c0, *weights = tensors
        return self._replace(x=x, h0=h0, c0=c0, weights=weights)


class Outputs(NamedTuple):
    """What a stack returns."""

    y: Tensor  # as x, with directions * R features
    h_n: Tensor | None  # as h0; None for a step, whose y it is
    c_n: Tensor | None  # as c0; None for cells without a cell state
    cell_states: Tensor | None = None  # of the last layer, as x with directions * H features
    saved: Tensor | None = None  # bytes that backward needs, where gradients are wanted


def output_shapes(config: StackConfig, inputs: Inputs, batch: Any = None) -> list[Any]:
    """Of y, h_n, c_n and the cell states; None for those that there are not.

    ``batch`` is how many rows a packed ``x`` has in its first step.
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
