"""One autograd Function for every cell: a stack of layers, in one direction or both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks, eager, ops
from .ops import Outputs, Spec


class _NotCoveredError(Exception):
    """The kernels do not take these arguments."""


def stack(
    spec: Spec,
    sizes: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Any],
    reset: Tensor | None = None,
    cells: bool = False,
    packed: Any = None,
) -> Outputs | None:
    """Run a stack of layers, as :func:`ops.forward` does, with gradients where they are wanted.

    A state that is None means zeros; ``c_n`` is None for cells without a cell state. ``packed`` is
    of use only without gradients.
    """
    if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        if not checks.PLAIN.issuperset(map(type, weights)):
            return None
        tensors = (x, h0, c0, *weights)
        if any(t is not None and t.requires_grad for t in tensors):
            try:
                return Outputs(*_Stack.apply(spec, sizes, reset, cells, *tensors))  # type: ignore[no-untyped-call]
            except _NotCoveredError:
                return None
    return ops.forward(spec, sizes, x, h0, c0, weights, False, reset, cells, packed)


class _Stack(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        spec: Spec,
        sizes: Tensor | None,
        reset: Tensor | None,
        cells: bool,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor | None, ...]:
        found = ops.forward(spec, sizes, x, h0, c0, list(weights), True, reset, cells)
        if found is None:
            raise _NotCoveredError
        y, h_n, c_n, c, saved = found
        ctx.spec = spec
        ctx.sizes = None if sizes is None else sizes.clone()  # the caller may reuse the memory
        ctx.set_materialize_grads(False)
        # Users of torch.nn may change y in place and still go backward, which torch refuses for what it
        # saves itself. So it saves an alias with versions of its own, and an alias without memory
        # shares the version of y.
        counter = y.detach()
        counter.set_()  # type: ignore[call-overload]
        ctx.y_counter, ctx.y_version = counter, counter._version
        ctx.save_for_backward(x, h0, c0, saved, y.data, reset, *weights)
        return y, h_n, c_n, c

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        spec: Spec = ctx.spec
        sizes: Tensor | None = ctx.sizes
        x, h0, c0, saved, y, reset, *weights = ctx.saved_tensors
        wanted, others = ctx.needs_input_grad[4:], (None,) * 4
        if all(g is None for g in grads):
            return (*others, *(None for _ in wanted))
        inputs = (x, h0, c0, *weights)
        batched = any(g is not None and not torch._C._has_storage(g) for g in grads)
        if batched or torch.is_grad_enabled():  # the latter: a graph of this backward is wanted
            return (*others, *differentiable(spec, sizes, reset, inputs, grads, wanted))
        if ctx.y_counter._version != ctx.y_version:  # y was changed in place since
            # Hooks on saved tensors may have returned others, not contiguous.
            x, h0, c0, *weights = inputs = tuple(map(ops.rows, inputs))
            again = ops.forward(spec, sizes, x, h0, c0, weights, True, reset)
            assert again is not None
            y, saved = again.y, again.saved
        found = ops.backward(spec, sizes, reset, inputs, y, saved, grads, wanted)
        if found is None:
            return (*others, *differentiable(spec, sizes, reset, inputs, grads, wanted))
        return (*others, *found)


def differentiable(
    spec: Spec,
    sizes: Tensor | None,
    reset: Tensor | None,
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
        x, h0, c0, *weights = own
        cells = grads[3] is not None
        outputs = eager_stack(spec, sizes, x, h0, c0, weights, reset, cells)  # type: ignore[arg-type]
    pairs = [(o, g) for o, g in zip(outputs[:4], grads, strict=True) if o is not None and g is not None]
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
    sizes: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    reset: Tensor | None = None,
    cells: bool = False,
) -> Outputs:
    """:func:`stack` in torch operators."""
    is_step = x.dim() == 2 and sizes is None
    if is_step and reset is not None:
        reset = reset[None]
    outputs, hidden = spec.widths(weights)
    batch_first = spec.batch_first and x.dim() == 3
    y = x[None] if is_step else x.transpose(0, 1) if batch_first else x
    if reset is not None and x.dim() == 3:
        reset = reset.transpose(0, 1) if batch_first else reset
    batch = y.size(1) if y.dim() == 3 else int(sizes[0])  # type: ignore[index]
    has_c = spec.has_c

    def state(of: Tensor | None, number: int, width: int) -> Tensor:
        if of is None:
            return x.new_zeros(batch, width)
        return of if of.dim() == 2 else of[number]

    h_n: list[Tensor] = []
    c_n: list[Tensor] = []
    for k in range(spec.layers):
        halves: list[Tensor] = []
        c_halves: list[Tensor] = []
        for d in range(spec.directions):
            number = k * spec.directions + d
            half, h, c, c_half = eager.layer(
                spec.cell,
                y,
                state(h0, number, outputs),
                state(c0, number, hidden) if has_c else None,
                spec.weights(weights, number),
                d == 1,
                sizes,
                reset,
                cells,
            )
            halves.append(half)
            h_n.append(h)
            if c is not None:
                c_n.append(c)
                c_halves.append(c_half)
        y = torch.cat(halves, -1)
    every_c = torch.cat(c_halves, -1) if cells and has_c else None
    if is_step:
        return Outputs(
            y[0], None, c_n[0] if has_c else None, every_c if every_c is None else every_c[0]
        )
    if batch_first:
        y = y.transpose(0, 1).contiguous()
        every_c = every_c if every_c is None else every_c.transpose(0, 1).contiguous()
    return Outputs(y, torch.stack(h_n), torch.stack(c_n) if has_c else None, every_c)
