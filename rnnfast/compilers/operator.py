"""What torch.compile and torch.export see: the operators ``rnnfast::stack`` and its backward.

An eager call does not come through here, since the dispatcher would cost it as much as a small kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, get_type_hints

import torch
from torch import Tensor

from ..stack import autograd, checks, ops, reference
from ..stack.config import Inputs, Outputs, StackConfig, output_shapes

# How a schema writes the types of the fields of Inputs and StackConfig.
_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    Sequence[Any]: "Tensor[]",
    str: "str",
    int: "int",
    bool: "bool",
}
#: The arguments that both operators begin with, and their types.
FIELDS: dict[str, Any] = {**get_type_hints(Inputs), **get_type_hints(StackConfig)}


_CALL = ", ".join(f"{_TYPES[kind]} {name}" for name, kind in FIELDS.items())
_OPERATORS = (
    f"stack({_CALL}, SymInt? batch, bool save)"
    " -> (Tensor y, Tensor h_n, Tensor c_n, Tensor cell_states, Tensor saved)",
    f"stack_backward({_CALL}, Tensor y, Tensor saved,"
    " Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dcell_states, bool[] wanted) -> Tensor[]",
)
_INPUTS, _CONFIG = len(Inputs._fields), len(Inputs._fields) + len(StackConfig._fields)

_LIBRARY: Any = torch.library.Library("rnnfast", "DEF")  # type: ignore[no-untyped-call]
for schema in _OPERATORS:
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def call_of(arguments: Sequence[Any]) -> tuple[Inputs, StackConfig, Sequence[Any]]:
    """The arguments of an operator: the bundle of inputs, the configuration, and the others."""
    inputs, config = Inputs(*arguments[:_INPUTS]), StackConfig(*arguments[_INPUTS:_CONFIG])
    return inputs, config, arguments[_CONFIG:]


def stack(config: StackConfig, inputs: Inputs, batch: int | None = None) -> Outputs | None:
    """As :func:`autograd.stack`, as one node of a graph, for packed sequences of ``batch`` rows."""
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs.tensors)
    inputs = inputs._replace(weights=list(inputs.weights))
    found = STACK(*inputs, *config, batch, save)
    there = _are_there(config, inputs)
    outputs: list[Any] = [t if is_there else None for t, is_there in zip(found, there, strict=False)]
    return Outputs(*outputs)


def _are_there(config: StackConfig, inputs: Inputs) -> tuple[bool, bool, bool, bool]:
    """Which of y, h_n, c_n and the cell states are; the operator gives the others as empty tensors."""
    return True, not inputs.is_step, config.has_c, config.cell_states


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, config, (batch, save) = call_of(arguments)
    inputs = inputs.with_tensors(map(ops.rows, inputs.tensors))
    found = ops.forward(config, inputs, save)
    if found is None:
        why = ops.why_not(config, inputs)
        raise RuntimeError(f"rnnfast::stack got tensors that its kernels do not take: {why}")
    if batch is not None and found.h_n is not None and found.h_n.size(1) != batch:
        raise RuntimeError(
            f"batch_sizes begins with {found.h_n.size(1)}; expected {batch}, the rows of the batch"
        )
    return _without_none(inputs.x, found)


def _without_none(x: Tensor, outputs: Outputs) -> tuple[Tensor, ...]:
    """Empty tensors in the place of None."""
    *others, saved = outputs
    bytes = x.new_empty(0, dtype=torch.uint8) if saved is None else saved
    return *(x.new_empty(0) if t is None else t for t in others), bytes


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, config, (batch, save) = call_of(arguments)
    x = inputs.x
    shapes = output_shapes(config, inputs, batch)
    saved = None
    if save:
        outputs, hidden = config.widths(inputs.weights)
        each = ops.saved_bytes_of_a_row(config, x, int(hidden), int(outputs))
        saved = x.new_empty(prod(x.shape[:-1]) * each, dtype=torch.uint8)
    made: list[Any] = [None if shape is None else x.new_empty(shape) for shape in shapes]
    y, h_n, c_n, cell_states = made
    return _without_none(x, Outputs(y, h_n, c_n, cell_states, saved))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    given, config, rest = call_of(inputs)
    y, *_, saved = output
    ctx.config = config
    ctx.there = _are_there(config, given)
    ctx.others = (None,) * (len(config) + len(rest))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(given.sizes, given.reset, y, saved, *given.tensors)


def _backward_of(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    sizes, reset, y, saved, x, h0, c0, *weights = ctx.saved_tensors
    inputs = Inputs(x, h0, c0, weights, sizes, reset)
    config: StackConfig = ctx.config
    needs = ctx.needs_input_grad
    wanted = [bool(needs[0]), bool(needs[1]), bool(needs[2])]
    each = needs[3] if isinstance(needs[3], Sequence) else [needs[3]] * len(weights)
    wanted += [bool(wants) for wants in each]
    given = [g if there else None for g, there in zip(grads[:4], ctx.there, strict=True)]
    if torch.is_grad_enabled():  # a graph of this backward is wanted
        found = [*autograd.differentiable(config, inputs, given, wanted)]
    else:
        found = STACK_BACKWARD(*inputs, *config, y, saved, *given, wanted)
    own = [g if wants else None for g, wants in zip(found, wanted, strict=True)]
    return (*own[:3], own[3:], None, None, *ctx.others)


def _backward(*arguments: Any) -> list[Tensor]:
    inputs, config, (y, saved, *grads, wanted) = call_of(arguments)
    inputs = inputs.with_tensors(map(ops.rows, inputs.tensors))
    if all(g is None for g in grads):
        grads[0] = torch.zeros_like(y)
    if not saved.numel() and y.numel():  # it was exported where no gradients were wanted
        again = ops.forward(config, inputs, save=True)
        assert again is not None
        assert again.saved is not None
        y, saved = again.y, again.saved
    found = ops.backward(config, inputs, ops.rows(y), saved, grads, wanted)  # type: ignore[arg-type]
    if found is None:
        found = [*autograd.differentiable(config, inputs, grads, wanted)]
    return [inputs.x.new_empty(0) if g is None else g for g in found]


def _backward_fake(*arguments: Any) -> list[Tensor]:
    inputs, _, (*_, wanted) = call_of(arguments)
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format)
        if wants and t is not None
        else inputs.x.new_empty(0)
        for t, wants in zip(inputs.tensors, wanted, strict=True)
    ]


for device in ("CPU", "CUDA"):
    _LIBRARY.impl("stack", _forward, device)
    _LIBRARY.impl("stack_backward", _backward, device)
torch.library.register_fake("rnnfast::stack", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("rnnfast::stack_backward", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd(
    "rnnfast::stack", _backward_of, setup_context=_setup_context, lib=_LIBRARY
)


def _eager(*arguments: Any) -> tuple[Tensor, ...]:
    """``rnnfast::stack`` on torch's operators; ``saved`` is empty, since nothing needs it."""
    inputs, config, _ = call_of(arguments)
    return _without_none(inputs.x, reference.stack(config, inputs))


_KNOWN = checks.PLAIN | {type(None), list, str, int, bool}


def _is_listened_to() -> bool:
    """Whether somebody wants to see the operators that run: autograd, a mode, the profiler."""
    return bool(
        torch.is_grad_enabled()
        or torch._C._autograd._profiler_enabled()
        or torch._C._len_torch_function_stack()
        or not checks.plain_call()
    )


def _shorten(
    overload: Any, kernel: Callable[..., Any], eager: Callable[..., Any] | None = None
) -> None:
    """Have a call that needs no dispatch, as those of compiled programs, go straight to its kernel.

    The dispatcher takes as long as the kernel of a small layer, twice. And it takes an operator of
    Python for constant under forward mode, in silence: there ``eager`` computes it.
    """
    dispatch = getattr(overload, "_op", None)
    if dispatch is None:
        return

    def call(*args: Any, **options: Any) -> Any:
        if eager is not None and not options and checks.transformed():
            return eager(*args)
        plain = len(args) > 3 and not options and _KNOWN.issuperset(map(type, args))
        if plain and not _is_listened_to() and checks.PLAIN.issuperset(map(type, args[3])):
            try:
                return kernel(*args)
            except (TypeError, ValueError, RuntimeError):
                pass  # not for the kernels, or wrong: the dispatcher knows
        return dispatch(*args, **options)

    overload._op = call


STACK: Any = torch.ops.rnnfast.stack.default
STACK_BACKWARD: Any = torch.ops.rnnfast.stack_backward.default
_shorten(STACK, _forward, _eager)
_shorten(STACK_BACKWARD, _backward)
