"""One autograd Function for every cell: a layer, in one direction or both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import eager, ops

Outputs = tuple[Tensor, Tensor, Tensor | None]


class Spec(NamedTuple):
    """What a layer is, beside its tensors."""

    cell: str
    bias: bool
    directions: int
    batch_first: bool  # y is [B, T, D * H]; x is [T, B, I] whatever this says
    batch_sizes: Tensor | None = None  # of a packed sequence: tensors are [rows, features]
    projected: bool = False

    def time_major(self, y: Tensor) -> Tensor:
        """``y`` or its gradient as the kernels see it, or back."""
        return y.transpose(0, 1) if self.batch_first else y

    def weights(self, tensors: Sequence[Any], direction: int) -> tuple[Any, Any, Any, Any, Any]:
        """w_ih, w_hh, b_ih, b_hh, w_hr of a direction in a flat list of weights (or of gradients)."""
        each = (4 if self.bias else 2) + self.projected
        w = tensors[direction * each : (direction + 1) * each]
        return w[0], w[1], *(w[2:4] if self.bias else (None, None)), w[-1] if self.projected else None

    def widths(self, weights: Sequence[Tensor]) -> tuple[int, int]:
        """Of h and of the cell: R and H, which are the same unless h is projected."""
        _, w_hh, _, _, w_hr = self.weights(weights, 0)
        return w_hh.size(1), (w_hh if w_hr is None else w_hr).size(1)


def layer(
    spec: Spec, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor]
) -> Outputs:
    """Run a layer: ``x [T, B, I]`` and states ``[D, B, H]`` to ``y [T, B, D * H]`` and states.

    ``y`` is ``[B, T, D * H]`` where ``spec.batch_first``. Where ``spec.projected``, its width stands in
    the place of H for ``y``, ``h0`` and ``h_n``.

    Where ``spec.batch_sizes`` is given, ``x`` and ``y`` are packed: ``[sum of batch_sizes, features]``.
    ``weights`` is flat, direction by direction, in torch's order. A state that is None means zeros;
    ``c_n`` is None for cells without a cell state.
    """
    tensors = (x, h0, c0, *weights)
    differentiable = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    if differentiable and any(t is not None and t.requires_grad for t in tensors):
        outputs: Outputs = _Layer.apply(spec, x, h0, c0, *weights)  # type: ignore[no-untyped-call]
        return outputs
    return _forward(spec, x, h0, c0, weights, None)


def _forward(
    spec: Spec,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    saved: list[Tensor] | None,
) -> Outputs:
    cell, has_c = ops.CELLS[spec.cell], spec.cell == "lstm"
    outputs, hidden = spec.widths(weights)
    features = spec.directions * outputs
    if spec.batch_sizes is not None:
        y, batch = x.new_empty(x.size(0), features), int(spec.batch_sizes[0])
    else:
        steps, batch, _ = x.shape
        y = x.new_empty((batch, steps, features) if spec.batch_first else (steps, batch, features))
    h_n = x.new_empty(spec.directions, batch, outputs)
    c_n = x.new_empty(spec.directions, batch, hidden) if has_c else None
    sequence = spec.time_major(y)
    for d in range(spec.directions):
        if saved is not None:
            saved.append(ops.new_saved(cell, x, hidden))
        inputs = ops.Inputs(x, _of(h0, d), _of(c0, d), *spec.weights(weights, d))
        written = ops.Outputs(_half(sequence, d, outputs), _of(h_n, d), _of(c_n, d))
        ops.forward(cell, d == 1, spec.batch_sizes, inputs, written, saved[d] if saved else None)
    return y, h_n, c_n


def _of(state: Tensor | None, direction: int) -> Tensor | None:
    return None if state is None else state[direction]


def _half(y: Tensor, direction: int, width: int) -> Tensor:
    return y.narrow(-1, direction * width, width) if y.size(-1) != width else y


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        spec: Spec,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        *weights: Tensor,
    ) -> Outputs:
        saved: list[Tensor] = []
        y, h_n, c_n = _forward(spec, x, h0, c0, weights, saved)
        ctx.spec = spec
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, h0, c0, *saved, *weights)
        # Not saved: torch would refuse a backward after y was changed in place, which users of
        # torch.nn may do. An alias without a graph, so that y and its graph do not hold each other.
        ctx.y, ctx.y_version = y.detach(), y._version
        return y, h_n, c_n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        spec: Spec = ctx.spec
        x, h0, c0, *rest = ctx.saved_tensors
        saved, weights = rest[: spec.directions], rest[spec.directions :]
        wanted = ctx.needs_input_grad[1:]
        if all(g is None for g in grads):
            return (None,) * (len(wanted) + 1)
        batched = any(g is not None and not torch._C._has_storage(g) for g in grads)
        if batched or torch.is_grad_enabled():  # the latter: a graph of this backward is wanted
            return (None, *_differentiable(spec, x, h0, c0, weights, grads, wanted))
        y = ctx.y
        if y._version != ctx.y_version:  # changed in place since
            saved = []
            y, _, _ = _forward(spec, x, h0, c0, weights, saved)
        return (None, *_backward(spec, x, h0, c0, weights, y, saved, grads, wanted))


def _backward(
    spec: Spec,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    y: Tensor,
    saved: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    def empty(t: Tensor | None, wants: bool) -> Tensor | None:
        if t is None or not wants:
            return None
        return torch.empty_like(t, memory_format=torch.contiguous_format)

    outputs, _ = spec.widths(weights)
    dy, dh_n, dc_n = grads
    y, dy = spec.time_major(y), None if dy is None else spec.time_major(dy)
    dx, dh0, dc0, *dweights = map(empty, (x, h0, c0, *weights), wanted)
    for d in range(spec.directions):
        ops.backward(
            ops.CELLS[spec.cell],
            d == 1,
            spec.batch_sizes,
            ops.Inputs(x, _of(h0, d), _of(c0, d), *spec.weights(weights, d)),
            _half(y, d, outputs),
            saved[d],
            ops.Outputs(None if dy is None else _half(dy, d, outputs), _of(dh_n, d), _of(dc_n, d)),
            ops.Inputs(dx, _of(dh0, d), _of(dc0, d), *spec.weights(dweights, d)),
            accumulate_dx=d == 1,
        )
    return (dx, dh0, dc0, *dweights)


def _differentiable(
    spec: Spec,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The same gradients as differentiable functions of the inputs and of ``grads``."""
    graph = torch.is_grad_enabled()
    tensors = (x, h0, c0, *weights)
    with torch.enable_grad():
        # Aliases: no gradient may follow a path from one input to another (h0 = f(x), tied weights).
        own = [
            t if t is None else t.view_as(t) if graph else t.detach().requires_grad_(wants)
            for t, wants in zip(tensors, wanted, strict=True)
        ]
        outputs = eager_layer(spec, own[0], own[1], own[2], own[3:])  # type: ignore[arg-type]
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o is not None and g is not None]
    inputs = [t for t, wants in zip(own, wanted, strict=True) if wants and t is not None]
    found = iter(
        torch.autograd.grad(
            [o for o, _ in pairs],
            inputs,
            [g for _, g in pairs],
            create_graph=graph,
            allow_unused=True,
        )
    )
    return tuple(next(found) if wants else None for wants in wanted)


def eager_layer(
    spec: Spec, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor]
) -> Outputs:
    """:func:`layer` in torch operators."""
    outputs, hidden = spec.widths(weights)
    batch = x.size(1) if spec.batch_sizes is None else int(spec.batch_sizes[0])
    has_c = spec.cell == "lstm"
    runs = [
        eager.layer(
            spec.cell,
            x,
            x.new_zeros(batch, outputs) if h0 is None else h0[d],
            (x.new_zeros(batch, hidden) if c0 is None else c0[d]) if has_c else None,
            spec.weights(weights, d),
            d == 1,
            spec.batch_sizes,
        )
        for d in range(spec.directions)
    ]
    y = spec.time_major(torch.cat([y for y, _, _ in runs], -1))  # its own inverse
    return (
        y.contiguous() if spec.batch_first else y,
        torch.stack([h for _, h, _ in runs]),
        torch.stack([c for _, _, c in runs if c is not None]) if has_c else None,
    )
