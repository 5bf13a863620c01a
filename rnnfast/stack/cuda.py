"""A stack of layers on a CUDA device.

torch computes the products with the inputs and with the gradients of the gates. The extension ``_cuda``
runs the recurrence, both directions of a layer in one launch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import checks, cuda_plans, cuda_precision
from .config import CELLS, Inputs, Outputs, StackConfig, output_shapes
from .cuda_products import Products, before, real, row_before

#: The longest sequence and the largest batch of the kernels: most_steps and most_rows in csrc/cuda.
MOST_STEPS, MOST_ROWS = 1 << 24, 1 << 30


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


class _Call:
    """The sizes of a call, and what all its layers share."""

    def __init__(self, config: StackConfig, inputs: Inputs) -> None:
        x, self.batch_sizes, reset = inputs.x, inputs.sizes, inputs.reset
        self.device = x.device
        self.stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
        self.batch_first = config.batch_first and self.batch_sizes is None
        self.rows: tuple[int, ...]  # [T, B], or packed [rows]
        if self.batch_sizes is not None:
            self.rows = (x.size(0),)
            self.steps, self.batch = len(self.batch_sizes), int(self.batch_sizes[0])
        else:
            self.rows = self.steps, self.batch = x.shape[1::-1] if self.batch_first else x.shape[:2]
        self.reset = reset.transpose(0, 1) if self.batch_first and reset is not None else reset

    @cached_property
    def first(self) -> Tensor | None:
        """If packed, on the device: the number of rows before each step, and of all steps."""
        if self.batch_sizes is None:
            return None
        return _on_device(F.pad(self.batch_sizes.cumsum(0), (1, 0)), self.device)

    @cached_property
    def _sources(self) -> dict[bool, Tensor]:
        return {}

    def source(self, reverse: bool) -> Tensor | None:
        """If packed, for each row where the state before its step is; see :func:`row_before`."""
        if self.first is None:
            return None
        if reverse not in self._sources:
            self._sources[reverse] = row_before(self.first, self.rows[0], reverse)
        return self._sources[reverse]

    def swapped(self, sequence: Any) -> Any:
        """A sequence with time first, or back to the layout of ``x``."""
        return sequence.transpose(0, 1) if self.batch_first and sequence is not None else sequence


def _plans(
    config: StackConfig, inputs: Inputs, call: _Call, hidden: int, training: bool
) -> cuda_plans.Pair | None:
    is_alone = inputs.reset is not None or config.cell_states
    options = {"training": training, "packed": inputs.sizes is not None, "alone": is_alone}
    return cuda_plans.plans(config, inputs.x, (hidden, call.batch), call.steps, **options)


def _on_device(table: Tensor, device: torch.device) -> Tensor:
    """A copy of ``table`` on ``device``, without waiting for the device."""
    if device.type != "cuda":
        return table
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "rnnfast: a packed sequence cannot be captured in a CUDA graph, since its lengths are in "
            "the host's memory; pad the batch"
        )
    # torch keeps pinned memory until the copy is done. The host would wait for a copy of other memory.
    return table.pin_memory().to(device, non_blocking=True)


def _run(plan: Any, call: _Call, x: Tensor, directions: list[tuple[Tensor | None, ...]]) -> bool:
    """Run the recurrence of a layer; False, with no effect, if the device refuses the launch."""
    space = plan.workspace_bytes
    workspace = x.new_empty(space, dtype=torch.uint8) if space else None
    sizes = (call.steps, call.batch_sizes, call.first)
    try:
        plan.run(call.stream, *sizes, call.reset, directions, workspace)
    except cuda_plans.refused() as error:
        cuda_plans.PLANS.drop(plan, str(error))
        return False
    return True


def _covers(config: StackConfig, inputs: Inputs) -> bool:
    x, tensors = inputs.x, inputs.tensors
    if not cuda_plans.has_kernels(config, x.dtype):
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
    if not cuda_plans.is_on() or not _covers(config, inputs):
        return None
    with cuda_plans.on_device(inputs.x.device.index or 0):
        return _forward(config, inputs, save)


def _forward(config: StackConfig, inputs: Inputs, save: bool) -> Outputs | None:
    x, h0, c0, weights, _, reset = inputs
    if reset is not None and (type(reset) is not Tensor or reset.dim() != x.dim() - 1):
        return None
    _, hidden = config.widths(weights)
    y, call = inputs.x, _Call(config, inputs)
    if call.steps > MOST_STEPS or call.batch > MOST_ROWS or not _fits(config, call, inputs):
        return None
    plans = _plans(config, inputs, call, hidden, save)
    if plans is None:
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
        below, width = y, config.directions * hidden  # the first layer reads x in its own layout
        if parts is not None and not is_last:
            y = parts.outputs[k]
        else:
            y = _new_sequence(x, call, width, is_last)
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
            with cuda_precision.products(x.dtype):
                products = F.linear(below, w_ih, b_ih)
            products = call.swapped(products) if k == 0 else products
            gates = None if parts is None else parts.gates[k][d]
            directions.append(
                (
                    *(products, _rows(w_hh), _rows(b_hh), _part(h0, number), _part(c0, number)),
                    *(_direction(y, d, hidden), every_c[d], gates),
                    *(h_n[number], _part(c_n, number)),
                )
            )
        if not _run(plans.forward, call, x, directions):
            return None
    c = None
    if config.cell_states and has_c:
        c = torch.cat([call.swapped(t) for t in every_c if t is not None], -1).to(x.dtype)
    return Outputs(call.swapped(y), h_n, c_n, c, saved)


def backward(
    config: StackConfig,
    inputs: Inputs,
    y: Tensor,
    saved: Tensor,
    grads: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None] | None:
    """As :func:`ops.backward`; None if no plan runs, since settings changed or the device refuses."""
    if not cuda_plans.is_on():
        return None
    with cuda_plans.on_device(inputs.x.device.index or 0):
        return _backward(config, inputs, y, saved, grads, wanted)


def _backward(
    config: StackConfig,
    inputs: Inputs,
    y: Tensor,
    saved: Tensor,
    grads: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None] | None:
    x, h0, c0, weights, _, _ = inputs
    _, hidden = config.widths(weights)
    cell = CELLS[config.cell]
    call = _Call(config, inputs)
    plans = _plans(config, inputs, call, hidden, True)
    if plans is None:
        return None
    parts = _Saved(saved, config, call.rows, x, hidden)
    dy, dh_n, dc_n, dcell_states = grads
    y, dy, dcell_states = map(call.swapped, (y, dy, dcell_states))
    outputs = [*parts.outputs, y]
    states = (config.layers * config.directions, call.batch, hidden)
    dh0, dc0 = (x.new_empty(states) if is_wanted else None for is_wanted in wanted[1:3])
    gradients: list[Tensor | None] = [None, dh0, dc0, *(None for _ in weights)]
    lowest = _lowest(config, wanted)
    for k in reversed(range(lowest, config.layers)):
        is_last = k == config.layers - 1
        numbers = range(k * config.directions, (k + 1) * config.directions)
        # The rows of all products of the first layer are in the order of x.
        dgates = [_new_sequence(x, call, cell.gates * hidden, k == 0) for _ in numbers]
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
        if not _run(plans.backward, call, x, directions):
            return None
        in_order = call.swapped if k == 0 else _same
        below = outputs[k - 1] if k > 0 else x
        dy = None
        no_autocast = torch.autocast(x.device.type, enabled=False)  # products in forward's dtypes
        with no_autocast, cuda_precision.products(x.dtype):
            for d, number in enumerate(numbers):
                start = 3 + number * config.weights_per_direction
                wanted_weights = wanted[start : start + config.weights_per_direction]
                products = Products(cell, hidden, in_order(dgates[d]).flatten(0, -2))
                w_ih, w_hh, b_ih, b_hh, _ = config.weights(weights, number)
                if k > lowest or wanted[0]:
                    part = products.of_input(w_ih)
                    dy = part if dy is None else dy.add_(part)
                if wanted_weights[0]:
                    gradients[start] = products.of_w_ih(w_ih, below.flatten(0, -2))
                if wanted_weights[1]:
                    y_d, reverse = _direction(outputs[k], d, hidden), d == 1
                    time = 1 if call.batch_first and k == 0 else 0
                    source = call.source(reverse)
                    h = before(in_order(y_d), _part(h0, number), source, reverse, time)
                    if call.reset is not None:
                        h = h.masked_fill(in_order(call.reset)[..., None], 0)
                    r = in_order(parts.gates[k][d])[..., :hidden]
                    gradients[start + 1] = products.of_w_hh(w_hh, h, r)
                if config.bias and wanted_weights[2]:
                    gradients[start + 2] = products.of_b_ih(b_ih)
                if config.bias and wanted_weights[3]:
                    gradients[start + 3] = products.of_b_hh(b_hh)
        dy = dy if dy is None else dy.view(*(x.shape[:-1] if k == 0 else call.rows), -1)
    if wanted[0]:
        gradients[0] = dy
    return gradients


def _same(sequence: Any) -> Any:
    return sequence


def _new_sequence(x: Tensor, call: _Call, width: int, as_x: bool) -> Tensor:
    """Memory for a sequence with time first; ``as_x`` says whether its layout is that of ``x``."""
    if as_x and call.batch_first:
        return x.new_empty(call.batch, call.steps, width).transpose(0, 1)
    return x.new_empty(*call.rows, width)


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
