"""One autograd Function for every cell: a stack of layers, in one direction or both."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from . import checks, flow, in_torch, ops, reference
from .config import Inputs, Outputs, StackConfig


class _NotCoveredError(Exception):
    """The kernels do not take these inputs."""


def stack(config: StackConfig, inputs: Inputs, packed: Any = None) -> Outputs | None:
    """:func:`ops.forward`, recorded by autograd if a tensor requires a gradient.

    ``packed`` is used only without gradients.
    """
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
        *tensors: Tensor | None,  # inputs.tensors: autograd sees only tensors that are arguments
    ) -> tuple[Tensor | None, ...]:
        outputs = ops.forward(config, inputs, save=True)
        if outputs is None:
            raise _NotCoveredError
        y, h_n, c_n, cell_states, saved = outputs
        ctx.config = config
        sizes = inputs.sizes
        ctx.sizes = None if sizes is None else sizes.clone()  # the caller may reuse the memory
        ctx.set_materialize_grads(False)
        # With torch.nn a user may change y in place before backward, but torch refuses this for a saved
        # tensor. So y.data is saved, an alias with its own version counter. An alias without memory
        # keeps y's version counter, by which backward notices the change.
        counter = y.detach()
        counter.set_()  # type: ignore[call-overload]
        ctx.y_counter, ctx.y_version = counter, counter._version
        # None is left out: torchviz cannot draw a node that has saved None.
        values = (inputs.reset, saved, y.data, *tensors)
        ctx.is_saved = [value is not None for value in values]
        ctx.save_for_backward(*(value for value in values if value is not None))
        return y, h_n, c_n, cell_states

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        config: StackConfig = ctx.config
        tensors = iter(ctx.saved_tensors)
        values: list[Any] = [next(tensors) if is_saved else None for is_saved in ctx.is_saved]
        reset, saved, y, x, h0, c0, *weights = values
        wanted, no_grads = ctx.needs_input_grad[2:], (None, None)  # of config and inputs: none
        if all(g is None for g in grads):
            return (*no_grads, *(None for _ in wanted))
        inputs = Inputs(x, h0, c0, weights, ctx.sizes, reset)
        is_vmapped = any(g is not None and not torch._C._has_storage(g) for g in grads)
        if is_vmapped or torch.is_grad_enabled():  # gradients are enabled with create_graph=True
            return (*no_grads, *differentiable(config, inputs, grads, wanted))
        if ctx.y_counter._version != ctx.y_version:  # y was changed in place after forward
            # Hooks on saved tensors may return tensors that are not contiguous.
            inputs = ops.readable(inputs)
            outputs = ops.forward(config, inputs, save=True)
            assert outputs is not None
            y, saved = outputs.y, outputs.saved
        call = (config, inputs, y, saved, grads, wanted)
        if flow.RECORDERS and not y.is_cuda:
            norms = flow.new_norms(config, inputs)
            grad_inputs = ops.backward(*call, norms)
            flow.record(config, inputs, norms)
        else:
            grad_inputs = ops.backward(*call)
        if grad_inputs is None:
            return (*no_grads, *differentiable(config, inputs, grads, wanted, in_torch.stack))
        return (*no_grads, *grad_inputs)


class _Hooks(OrderedDict[int, Callable[[Tensor], Any]]):
    """The hooks of an output, which are not called without a gradient.

    The engine calls the hooks of all outputs of a node. It passes None for an output without gradient.
    torch.autograd.graph.register_multi_grad_hook counts the calls of its own hooks, which take None.
    """

    def __setitem__(self, number: int, hook: Callable[[Tensor], Any]) -> None:
        if getattr(hook, "__module__", None) == torch.autograd.graph.__name__:
            super().__setitem__(number, hook)
            return

        @wraps(hook)
        def call(grad: Tensor | None) -> Any:
            return None if grad is None else hook(grad)

        super().__setitem__(number, call)


def _register_hooks(node: Any, output: Any) -> None:
    """What ``output.register_hook`` calls the first time."""
    output._backward_hooks = _Hooks()
    super(_node_type, node)._register_hook_dict(output)


# An alias of each output would do the same, but torch refuses `h.detach_()` of an alias.
_node_type: Any = _Stack._backward_cls
_node_type._register_hook_dict = _register_hooks


def differentiable(
    config: StackConfig,
    inputs: Inputs,
    grads: Sequence[Tensor | None],
    wanted: Sequence[bool],
    compute: Callable[[StackConfig, Inputs], Outputs] = reference.stack,
) -> tuple[Tensor | None, ...]:
    """The gradients of :func:`ops.backward`, differentiable with respect to inputs and ``grads``.

    ``compute`` computes forward. The default can be differentiated in every way.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: no gradient may follow a path from one input to another (h0 = f(x), tied weights).
        aliases = [
            t if t is None else t.view_as(t) if create_graph else t.detach().requires_grad_(is_wanted)
            for t, is_wanted in zip(inputs.tensors, wanted, strict=True)
        ]
        outputs = compute(config, inputs.with_tensors(aliases))
    pairs = [(o, g) for o, g in zip(outputs[:4], grads, strict=True) if o is not None and g is not None]
    leaves = [t for t, is_wanted in zip(aliases, wanted, strict=True) if is_wanted and t is not None]
    gradients = iter(
        torch.autograd.grad(
            [o for o, _ in pairs],
            leaves,
            [g for _, g in pairs],
            create_graph=create_graph,
            allow_unused=True,
        )
    )
    return tuple(next(gradients) if is_wanted else None for is_wanted in wanted)
