"""One autograd Function for every cell: a stack of layers, in one direction or both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks, ops, reference
from .config import Inputs, Outputs, StackConfig


class _NotCoveredError(Exception):
    """The kernels do not take these inputs."""


def stack(config: StackConfig, inputs: Inputs, packed: Any = None) -> Outputs | None:
    """:func:`ops.forward`, with gradients where they are wanted; ``packed`` is of use without them."""
    if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        if not checks.PLAIN.issuperset(map(type, inputs.weights)):
            return None
        tensors = inputs.tensors
        if any(t is not None and t.requires_grad for t in tensors):
            try:
                return Outputs(*_Stack.apply(config, inputs, *tensors))  # type: ignore[no-untyped-call]
            except _NotCoveredError:
                return None
    return ops.forward(config, inputs, packed=packed)


class _Stack(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        config: StackConfig,
        inputs: Inputs,
        *tensors: Tensor | None,  # inputs.tensors: those among the arguments have gradients
    ) -> tuple[Tensor | None, ...]:
        found = ops.forward(config, inputs, save=True)
        if found is None:
            raise _NotCoveredError
        y, h_n, c_n, cell_states, saved = found
        ctx.config = config
        sizes = inputs.sizes
        ctx.sizes = None if sizes is None else sizes.clone()  # the caller may reuse the memory
        ctx.set_materialize_grads(False)
        # Users of torch.nn may change y in place and still go backward, which torch refuses for what it
        # saves itself. So it saves an alias with versions of its own, and an alias without memory
        # shares the version of y.
        counter = y.detach()
        counter.set_()  # type: ignore[call-overload]
        ctx.y_counter, ctx.y_version = counter, counter._version
        ctx.save_for_backward(inputs.reset, saved, y.data, *tensors)
        return y, h_n, c_n, cell_states

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        config: StackConfig = ctx.config
        reset, saved, y, x, h0, c0, *weights = ctx.saved_tensors
        wanted, others = ctx.needs_input_grad[2:], (None,) * 2
        if all(g is None for g in grads):
            return (*others, *(None for _ in wanted))
        inputs = Inputs(x, h0, c0, weights, ctx.sizes, reset)
        batched = any(g is not None and not torch._C._has_storage(g) for g in grads)
        if batched or torch.is_grad_enabled():  # the latter: a graph of this backward is wanted
            return (*others, *differentiable(config, inputs, grads, wanted))
        if ctx.y_counter._version != ctx.y_version:  # y was changed in place since
            # Hooks on saved tensors may have returned others, not contiguous.
            inputs = inputs.with_tensors(map(ops.rows, inputs.tensors))
            again = ops.forward(config, inputs, save=True)
            assert again is not None
            y, saved = again.y, again.saved
        found = ops.backward(config, inputs, y, saved, grads, wanted)
        if found is None:
            return (*others, *differentiable(config, inputs, grads, wanted))
        return (*others, *found)


def differentiable(
    config: StackConfig,
    inputs: Inputs,
    grads: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The same gradients as differentiable functions of the inputs and of ``grads``."""
    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: no gradient may follow a path from one input to another (h0 = f(x), tied weights).
        own = [
            t if t is None else t.view_as(t) if graph else t.detach().requires_grad_(wants)
            for t, wants in zip(inputs.tensors, wanted, strict=True)
        ]
        outputs = reference.stack(config, inputs.with_tensors(own))
    pairs = [(o, g) for o, g in zip(outputs[:4], grads, strict=True) if o is not None and g is not None]
    leaves = [t for t, wants in zip(own, wanted, strict=True) if wants and t is not None]
    found = iter(
        torch.autograd.grad(
            [o for o, _ in pairs],
            leaves,
            [g for _, g in pairs],
            create_graph=graph,
            allow_unused=True,
        )
    )
    return tuple(next(found) if wants else None for wants in wanted)
