"""One autograd Function for every cell: a stack of layers, in one direction or both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import eager, ops
from .ops import Outputs, Spec


class _NotCoveredError(Exception):
    """The kernels do not take these arguments."""


def stack(
    spec: Spec,
    batch_sizes: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Any],
    packed: Any = None,
) -> Outputs | None:
    """Run a stack of layers, as :func:`ops.forward` does, with gradients where they are wanted.

    A state that is None means zeros; ``c_n`` is None for cells without a cell state. ``packed`` is
    of use only without gradients.
    """
    if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        tensors = (x, h0, c0, *weights)
        if any(t is not None and t.requires_grad for t in tensors):
            try:
                return Outputs(*_Stack.apply(spec, batch_sizes, *tensors))  # type: ignore[no-untyped-call]
            except _NotCoveredError:
                return None
    found = ops.forward(spec, batch_sizes, x, h0, c0, weights, save=False, packed=packed)
    return None if found is None else found[0]


class _Stack(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        spec: Spec,
        batch_sizes: Tensor | None,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor | None, ...]:
        found = ops.forward(spec, batch_sizes, x, h0, c0, list(weights), save=True)
        if found is None:
            raise _NotCoveredError
        (y, h_n, c_n), saved = found
        ctx.spec, ctx.batch_sizes = spec, batch_sizes
        ctx.set_materialize_grads(False)
        # Users of torch.nn may change y in place and still go backward, which torch refuses for what it
        # saves itself. So it saves an alias with versions of its own, and an alias without memory
        # shares the version of y.
        counter = y.detach()
        counter.set_()  # type: ignore[call-overload]
        ctx.y_counter, ctx.y_version = counter, counter._version
        ctx.save_for_backward(x, h0, c0, saved, y.data, *weights)
        return y, h_n, c_n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        spec: Spec = ctx.spec
        batch_sizes: Tensor | None = ctx.batch_sizes
        x, h0, c0, saved, y, *weights = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        if all(g is None for g in grads):
            return (None,) * (len(wanted) + 2)
        inputs = (x, h0, c0, *weights)
        batched = any(g is not None and not torch._C._has_storage(g) for g in grads)
        if batched or torch.is_grad_enabled():  # the latter: a graph of this backward is wanted
            return (None, None, *_differentiable(spec, batch_sizes, inputs, grads, wanted))
        if ctx.y_counter._version != ctx.y_version:  # y was changed in place since
            # Hooks on saved tensors may have returned others, not contiguous.
            x, h0, c0, *weights = inputs = tuple(map(ops.rows, inputs))
            again = ops.forward(spec, batch_sizes, x, h0, c0, weights, save=True)
            assert again is not None
            y, saved = again[0].y, again[1]
        return (None, None, *ops.backward(spec, batch_sizes, inputs, y, saved, grads, wanted))


def _differentiable(
    spec: Spec,
    batch_sizes: Tensor | None,
    tensors: tuple[Tensor | None, ...],
    grads: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The same gradients as differentiable functions of the inputs and of ``grads``."""
    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: no gradient may follow a path from one input to another (h0 = f(x), tied weights).
        own = [
            t if t is None else t.view_as(t) if graph else t.detach().requires_grad_(wants)
            for t, wants in zip(tensors, wanted, strict=True)
        ]
        outputs = eager_stack(spec, batch_sizes, own[0], own[1], own[2], own[3:])  # type: ignore[arg-type]
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


def eager_stack(
    spec: Spec,
    batch_sizes: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
) -> Outputs:
    """:func:`stack` in torch operators."""
    is_step = x.dim() == 2 and batch_sizes is None
    outputs, hidden = spec.widths(weights)
    batch_first = spec.batch_first and x.dim() == 3
    y = x[None] if is_step else x.transpose(0, 1) if batch_first else x
    batch = y.size(1) if batch_sizes is None else int(batch_sizes[0])
    has_c = spec.cell == "lstm"

    def state(of: Tensor | None, number: int, width: int) -> Tensor:
        if of is None:
            return x.new_zeros(batch, width)
        return of if of.dim() == 2 else of[number]

    h_n: list[Tensor] = []
    c_n: list[Tensor] = []
    for k in range(spec.layers):
        halves = []
        for d in range(spec.directions):
            number = k * spec.directions + d
            half, h, c = eager.layer(
                spec.cell,
                y,
                state(h0, number, outputs),
                state(c0, number, hidden) if has_c else None,
                spec.weights(weights, number),
                d == 1,
                batch_sizes,
            )
            halves.append(half)
            h_n.append(h)
            if c is not None:
                c_n.append(c)
        y = torch.cat(halves, -1)
    if is_step:
        return Outputs(y[0], None, c_n[0] if has_c else None)
    y = y.transpose(0, 1).contiguous() if batch_first else y
    return Outputs(y, torch.stack(h_n), torch.stack(c_n) if has_c else None)
