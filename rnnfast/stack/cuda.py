"""A stack of layers on a CUDA device.

torch computes the products with the inputs and with the gradients of the gates. The extension ``_cuda``
runs the recurrence, both directions of a layer in one launch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .._native import _cuda
from . import checks
from .config import CELLS, Inputs, Outputs, StackConfig, output_shapes
from .cuda_products import Products, before, real

#: The dtypes in which the kernels compute, and their names in the extension.
DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


def _tf32(dtype: torch.dtype) -> bool:
    """Whether float32 products may use TF32, by the setting for cuDNN's recurrent kernels."""
    if dtype != torch.float32:
        return False
    try:
        return bool(torch.backends.cudnn.allow_tf32)
    except RuntimeError:  # raised if the setting was made by its newer name
        return bool(torch.backends.cudnn.rnn.fp32_precision == "tf32")  # type: ignore[attr-defined]


@cache
def _plan(
    device: int,
    cell: str,
    dtype: torch.dtype,
    tf32: bool,
    backward: bool,
    sizes: tuple[int, int, int],  # hidden units, rows of the batch, directions
    tier: str | None,
) -> Any:
    return _cuda.plan(device, CELLS[cell].number, DTYPES[dtype], tf32, backward, sizes, tier)


def plan(config: StackConfig, x: Tensor, hidden: int, batch: int, backward: bool) -> Any:
    """The extension's Plan for a layer, or None if no tier fits.

    RNNFAST_CUDA_TIER chooses the tier: ``auto`` (the first that fits), ``block``, ``cluster`` or
    ``grid``. If it is not set, the result is None: the kernels have not run on a device yet, so they
    run only on request.
    """
    device = x.device.index or 0
    return _allowed_plan(device, config.cell, config.directions, x.dtype, hidden, batch, backward)


def _allowed_plan(
    device: int,
    cell: str,
    directions: int,
    dtype: torch.dtype,
    hidden: int,
    batch: int,
    backward: bool,
) -> Any:
    allowed = os.environ.get("RNNFAST_CUDA_TIER")
    if not allowed:
        return None
    tier = None if allowed == "auto" else allowed
    sizes = (hidden, batch, directions)
    return _plan(device, cell, dtype, _tf32(dtype), backward, sizes, tier)


def widest_of_each_tier(device: int, cell: str, dtype: torch.dtype, rows: int) -> dict[str, int]:
    """For each tier the largest H, in steps of 8, whose training runs on the tier."""
    widest: dict[str, int] = {}
    for hidden in range(8, 4096 + 1, 8):
        plans = [
            _plan(device, cell, dtype, _tf32(dtype), backward, (hidden, rows, 1), None)
            for backward in (False, True)
        ]
        if None in plans:
            break
        widest[plans[0].tier] = hidden
    return widest


def takes(config: StackConfig, x: Tensor, hidden: int) -> bool:
    """Whether a layer of this size has a plan for a batch of one row."""
    if _cuda is None or x.dtype not in DTYPES or config.projected:
        return False
    return bool(_takes(x.device.index or 0, config.cell, config.directions, x.dtype, hidden))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _takes(device: int, cell: str, directions: int, dtype: torch.dtype, hidden: int) -> bool:
    return all(
        _allowed_plan(device, cell, directions, dtype, hidden, 1, backward) is not None
        for backward in (False, True)
    )


def saved_bytes_of_a_row(config: StackConfig, dtype: torch.dtype, hidden: int) -> int:
    """The bytes of ``Outputs.saved`` for each row of ``x``."""
    cell, number = CELLS[config.cell], config.layers * config.directions
    cells = number * cell.has_c * hidden * real(dtype).itemsize
    between = (config.layers - 1) * config.directions * hidden
    return cells + (number * cell.gates * hidden + between) * dtype.itemsize


class _Saved:
    """What backward needs, in one tensor: cell states, gates, outputs of all layers but the last."""

    def __init__(
        self, memory: Tensor, config: StackConfig, rows: tuple[int, ...], x: Tensor, hidden: int
    ) -> None:
        cell, dtype = CELLS[config.cell], x.dtype
        self._memory, self._used, self._rows = memory, 0, rows
        layers, directions = range(config.layers), range(config.directions)
        self.cells: list[list[Tensor | None]] = [
            [self._take(real(dtype), hidden) if cell.has_c else None for _ in directions]
            for _ in layers
        ]
        self.gates = [[self._take(dtype, cell.gates * hidden) for _ in directions] for _ in layers]
        self.outputs = [self._take(dtype, config.directions * hidden) for _ in layers[1:]]

    def _take(self, dtype: torch.dtype, width: int) -> Tensor:
        count = width * dtype.itemsize * math.prod(self._rows)
        start, self._used = self._used, self._used + count
        return self._memory[start : self._used].view(dtype).view(*self._rows, width)


class _Call(NamedTuple):
    """The sizes of a call, and the arguments that all its layers share."""

    rows: tuple[int, ...]  # [T, B], or packed [rows]
    steps: int
    batch: int
    batch_sizes: Tensor | None
    first: Tensor | None  # if packed, memory for the number of rows before each step
    reset: Tensor | None
    batch_first: bool
    stream: int


def _call(config: StackConfig, inputs: Inputs) -> tuple[Tensor, _Call]:
    """``x`` with time first, and the call."""
    x, _, _, _, batch_sizes, reset = inputs
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    if batch_sizes is not None:
        steps = len(batch_sizes)
        first = x.new_empty(8 * (steps + 1), dtype=torch.uint8)
        batch = int(batch_sizes[0])
        return x, _Call((x.size(0),), steps, batch, batch_sizes, first, reset, False, stream)
    batch_first = config.batch_first
    if batch_first:
        x, reset = x.transpose(0, 1), reset if reset is None else reset.transpose(0, 1)
    steps, batch = x.shape[:2]
    return x, _Call((steps, batch), steps, batch, None, None, reset, batch_first, stream)


def _run(plan: Any, call: _Call, x: Tensor, directions: list[tuple[Tensor | None, ...]]) -> None:
    space = plan.workspace_bytes
    workspace = x.new_empty(space, dtype=torch.uint8) if space else None
    plan.run(
        *(call.stream, call.steps, call.batch_sizes, call.first, call.reset, directions, workspace)
    )


def _covers(config: StackConfig, inputs: Inputs) -> bool:
    x, tensors = inputs.x, inputs.tensors
    if _cuda is None or x.dtype not in DTYPES or config.projected:
        return False
    if x.is_cuda and torch.is_autocast_enabled("cuda"):
        return False
    if x.numel() == 0 or x.dim() != (3 if inputs.sizes is None else 2):
        return False
    if len(tensors) != 3 + config.layers * config.directions * config.weights_per_direction:
        return False
    return all(
        t is None
        or (
            type(t) in checks.PLAIN
            and t.device == x.device
            and t.dtype == x.dtype
            and t.layout == torch.strided
        )
        for t in tensors
    )


def _fits(config: StackConfig, call: _Call, inputs: Inputs) -> bool:
    """Whether the shapes fit the layer. If not, torch raises its exception."""
    x, h0, c0, weights, _, reset = inputs
    _, hidden = config.widths(weights)
    cell = CELLS[config.cell]
    rows = hidden * (1 + max(cell.weight_block))
    shape = (config.layers * config.directions, call.batch, hidden)
    if any(t is not None and t.shape != shape for t in (h0, c0)):
        return False
    if reset is not None and (reset.dtype, reset.shape) != (torch.bool, x.shape[:-1]):
        return False
    for number in range(config.layers * config.directions):
        w_ih, w_hh, b_ih, b_hh, _ = config.weights(weights, number)
        width = x.size(-1) if number < config.directions else config.directions * hidden
        if w_ih.shape != (rows, width) or w_hh.shape != (rows, hidden):
            return False
        if any(b is not None and b.shape != (rows,) for b in (b_ih, b_hh)):
            return False
    return True


def forward(config: StackConfig, inputs: Inputs, save: bool = False) -> Outputs | None:
    """As :func:`ops.forward`; None, with no effect, if no kernel takes the inputs."""
    if not _covers(config, inputs):
        return None
    x, h0, c0, weights, _, reset = inputs
    if reset is not None and (type(reset) is not Tensor or reset.dim() != x.dim() - 1):
        return None
    _, hidden = config.widths(weights)
    y, call = _call(config, inputs)
    if not _fits(config, call, inputs):
        return None
    layer_plan = plan(config, x, hidden, call.batch, False)
    if layer_plan is None or (save and plan(config, x, hidden, call.batch, True) is None):
        return None
    saved = parts = None
    if save:
        count = saved_bytes_of_a_row(config, x.dtype, hidden) * math.prod(call.rows)
        saved = x.new_empty(count, dtype=torch.uint8)
        parts = _Saved(saved, config, call.rows, x, hidden)
    has_c = CELLS[config.cell].has_c
    _, states, _, _ = output_shapes(config, inputs, call.batch)
    h_n, c_n = x.new_empty(states), x.new_empty(states) if has_c else None
    every_c: list[Tensor | None] = []
    for k in range(config.layers):
        is_last = k == config.layers - 1
        below, width = y, config.directions * hidden
        if parts is not None and not is_last:
            y = parts.outputs[k]
        elif is_last and call.batch_first:
            y = x.new_empty(call.batch, call.steps, width).transpose(0, 1)
        else:
            y = x.new_empty(*call.rows, width)
        if parts is not None:
            every_c = parts.cells[k]
        else:
            is_wanted = config.cell_states and is_last and has_c
            every_c = [
                x.new_empty(*call.rows, hidden, dtype=real(x.dtype)) if is_wanted else None
                for _ in range(config.directions)
            ]
        directions: list[tuple[Tensor | None, ...]] = []
        for d in range(config.directions):
            number = k * config.directions + d
            w_ih, w_hh, b_ih, b_hh, _ = config.weights(weights, number)
            products = F.linear(below, w_ih, b_ih)
            gates = None if parts is None else parts.gates[k][d]
            directions.append(
                (
                    *(products, _rows(w_hh), _rows(b_hh), _part(h0, number), _part(c0, number)),
                    *(_direction(y, d, hidden), every_c[d], gates),
                    *(h_n[number], _part(c_n, number)),
                )
            )
        _run(layer_plan, call, x, directions)
    c = None
    if config.cell_states and has_c:
        c = torch.cat([t for t in every_c if t is not None], -1).to(x.dtype)
    if call.batch_first:
        y, c = y.transpose(0, 1), c if c is None else c.transpose(0, 1).contiguous()
    return Outputs(y, h_n, c_n, c, saved)


def backward(
    config: StackConfig,
    inputs: Inputs,
    y: Tensor,
    saved: Tensor,
    grads: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None] | None:
    """As :func:`ops.backward`; None if there is no plan any more, since settings changed."""
    x, h0, c0, weights, batch_sizes, _ = inputs
    _, hidden = config.widths(weights)
    cell = CELLS[config.cell]
    first_input, call = _call(config, inputs)
    layer_plan = plan(config, x, hidden, call.batch, True)
    if layer_plan is None:
        return None
    parts = _Saved(saved, config, call.rows, x, hidden)
    dy, dh_n, dc_n, dcell_states = grads
    if call.batch_first:
        y, dy, dcell_states = (t if t is None else t.transpose(0, 1) for t in (y, dy, dcell_states))  # type: ignore[assignment]
    outputs = [*parts.outputs, y]
    states = (config.layers * config.directions, call.batch, hidden)
    dh0, dc0 = (x.new_empty(states) if is_wanted else None for is_wanted in wanted[1:3])
    gradients: list[Tensor | None] = [None, dh0, dc0, *(None for _ in weights)]
    lowest = _lowest(config, wanted)
    for k in reversed(range(lowest, config.layers)):
        is_last = k == config.layers - 1
        numbers = range(k * config.directions, (k + 1) * config.directions)
        dgates = [x.new_empty(*call.rows, cell.gates * hidden) for _ in numbers]
        directions: list[tuple[Tensor | None, ...]] = []
        for d, number in enumerate(numbers):
            w_hh = config.weights(weights, number)[1]
            directions.append(
                (
                    *(None, _rows(w_hh), None, _part(h0, number), _part(c0, number)),
                    *(
                        _direction(outputs[k], d, hidden),
                        parts.cells[k][d],
                        parts.gates[k][d],
                        None,
                        None,
                    ),
                    *(
                        _direction(dy, d, hidden),
                        _direction(dcell_states, d, hidden) if is_last else None,
                    ),
                    *(_part(dh_n, number), _part(dc_n, number), dgates[d]),
                    *(_part(dh0, number), _part(dc0, number)),
                )
            )
        _run(layer_plan, call, x, directions)
        below = outputs[k - 1] if k > 0 else first_input
        dy = None
        with torch.autocast(x.device.type, enabled=False):  # products in forward's dtypes
            for d, number in enumerate(numbers):
                start = 3 + number * config.weights_per_direction
                wanted_weights = wanted[start : start + config.weights_per_direction]
                products = Products(cell, hidden, dgates[d].flatten(0, -2))
                w_ih, w_hh, b_ih, b_hh, _ = config.weights(weights, number)
                if k > lowest or wanted[0]:
                    part = products.of_input(w_ih)
                    dy = part if dy is None else dy.add_(part)
                if wanted_weights[0]:
                    gradients[start] = products.of_w_ih(w_ih, below.flatten(0, -2))
                if wanted_weights[1]:
                    y_d, initial = _direction(outputs[k], d, hidden), _part(h0, number)
                    h = before(y_d, initial, d == 1, batch_sizes, call.reset)
                    gradients[start + 1] = products.of_w_hh(w_hh, h, parts.gates[k][d])
                if config.bias and wanted_weights[2]:
                    gradients[start + 2] = products.of_b_ih(b_ih)
                if config.bias and wanted_weights[3]:
                    gradients[start + 3] = products.of_b_hh(b_hh)
        dy = dy if dy is None else dy.view(*call.rows, -1)
    if wanted[0]:
        assert dy is not None
        gradients[0] = dy.transpose(0, 1).contiguous() if call.batch_first else dy
    return gradients


def _lowest(config: StackConfig, wanted: Sequence[bool]) -> int:
    """The lowest layer for which a gradient is wanted."""
    if any(wanted[:3]):
        return 0
    layer_weights = config.directions * config.weights_per_direction
    for k in range(config.layers):
        if any(wanted[3 + k * layer_weights : 3 + (k + 1) * layer_weights]):
            return k
    return config.layers


def _rows(t: Any) -> Any:
    return t if t is None else checks.readable(t)


def _part(states: Tensor | None, number: int) -> Tensor | None:
    return None if states is None else _rows(states[number])


def _direction(sequence: Any, d: int, hidden: int) -> Any:
    """The features of direction ``d``."""
    return None if sequence is None else _rows(sequence[..., d * hidden : (d + 1) * hidden])
