"""The operators ``rnnfast::stack`` and its backward, which torch.compile and torch.export see.

An eager call does not use the operators, since the dispatcher takes as long as a small kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, get_type_hints

import torch
from torch import Tensor

from ..stack import autograd, checks, in_torch, ops, precision, reference
from ..stack.config import Inputs, Outputs, StackConfig, output_shapes

# The types of the fields of Inputs and StackConfig, as a schema writes them.
_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    Sequence[Any]: "Tensor[]",
    str: "str",
    int: "int",
    bool: "bool",
}
_WIDEST_VECTOR = 64  # bytes; of all instruction sets for which the kernels are compiled
#: The first arguments of both operators, and their types.
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
    """The arguments of an operator as the inputs, the configuration, and the other arguments."""
    inputs, config = Inputs(*arguments[:_INPUTS]), StackConfig(*arguments[_INPUTS:_CONFIG])
    return inputs, config, arguments[_CONFIG:]


def _resolved(config: StackConfig) -> StackConfig:
    """The configuration with the precision of now, where a graph left it open."""
    if config.precision >= 0:
        return config
    return config._replace(precision=precision.float32_setting())


def stack(config: StackConfig, inputs: Inputs, batch: int | None = None) -> Outputs | None:
    """As :func:`autograd.stack`, as one node of a graph; ``batch`` is the batch size if x is packed."""
    save = False
    for t in inputs.tensors if torch.is_grad_enabled() else ():  # see precision.choose
        save = save or (t is not None and t.requires_grad)
    # Backward reads the lengths and y, which the caller may change in place after the call.
    if save and inputs.sizes is not None and not inputs.is_packed:
        inputs = inputs._replace(sizes=inputs.sizes.clone())
    y, h_n, c_n, cell_states = STACK(*inputs, *config, batch, save)[:4]
    _, has_h_n, has_c_n, has_cell_states = _presence(config, inputs)
    return Outputs(
        y.clone() if save else y,
        h_n if has_h_n else None,
        c_n if has_c_n else None,
        cell_states if has_cell_states else None,
    )


def _presence(config: StackConfig, inputs: Inputs) -> tuple[bool, bool, bool, bool]:
    """Whether y, h_n, c_n and the cell states exist. The operator returns an empty tensor if not."""
    return True, not inputs.is_step, config.has_c, config.cell_states


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, config, (batch, save) = call_of(arguments)
    inputs, config = ops.readable(inputs), _resolved(config)
    if inputs.x.dim() == 3 and inputs.x.size(1 if config.batch_first else 0) == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")  # torch's words
    outputs = ops.forward(config, inputs, save)
    if outputs is None and inputs.x.is_cuda:
        outputs = _in_torch(config, inputs, save)
    if outputs is None:
        reason = ops.why_not(config, inputs)
        raise RuntimeError(f"rnnfast::stack got tensors that its kernels do not take: {reason}")
    if batch is not None and outputs.h_n is not None and outputs.h_n.size(1) != batch:
        raise RuntimeError(
            f"batch_sizes begins with {outputs.h_n.size(1)}; expected {batch}, the rows of the batch"
        )
    y, *others, saved = _without_none(inputs.x, outputs)
    if save and inputs.x.is_cpu:
        missing = _saved_size(config, inputs, _in_widest_vectors(config, inputs)) - saved.numel()
        saved = torch.nn.functional.pad(saved, (0, missing)) if missing else saved
    return y, *others, saved


def _saved_size(config: StackConfig, inputs: Inputs, hidden: int | None = None) -> Any:
    """The bytes of ``Outputs.saved``; ``hidden`` replaces H if it is given."""
    x = inputs.x
    outputs, width = config.widths(inputs.weights)
    width = int(width) if hidden is None else hidden
    return prod(x.shape[:-1]) * ops.saved_bytes_of_a_row(config, x, width, int(outputs))


def _in_widest_vectors(config: StackConfig, inputs: Inputs) -> int:
    """H, on a CPU rounded up to whole vectors of the widest instruction set.

    The kernels round H up to whole vectors of their own instruction set. A graph contains the size of
    ``saved``, and a cache may give the graph to a process with another instruction set. So in the
    operator ``saved`` has the size of the widest one, with unused bytes at its end.
    """
    _, hidden = config.widths(inputs.weights)
    if inputs.x.is_cuda:
        return int(hidden)
    lanes = _WIDEST_VECTOR // max(inputs.x.dtype.itemsize, torch.float32.itemsize)
    return -(-int(hidden) // lanes) * lanes


def _in_torch(config: StackConfig, inputs: Inputs, save: bool) -> Outputs:
    """The outputs of inputs that no CUDA kernel takes, for example of a batch that is too large.

    Backward computes the layer again, and does not read ``saved``. ``saved`` has NaNs, so that a wrong
    use of it would show.
    """
    outputs = in_torch.stack(config, inputs)
    outputs = outputs._replace(y=outputs.y.contiguous())  # as the operator promises
    if not save:
        return outputs
    size = (_saved_size(config, inputs),)
    return outputs._replace(saved=inputs.x.new_full(size, 255, dtype=torch.uint8))


def _without_none(x: Tensor, outputs: Outputs) -> tuple[Tensor, ...]:
    """The outputs, with an empty tensor instead of None."""
    *results, saved = outputs
    saved = x.new_empty(0, dtype=torch.uint8) if saved is None else saved
    return *(x.new_empty(0) if t is None else t for t in results), saved


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, config, (batch, save) = call_of(arguments)
    x = inputs.x
    shapes = output_shapes(config, inputs, batch)
    saved = None
    if save:
        size = _saved_size(_resolved(config), inputs, _in_widest_vectors(config, inputs))
        saved = x.new_empty(size, dtype=torch.uint8)
    tensors: list[Any] = [None if shape is None else x.new_empty(shape) for shape in shapes]
    y, h_n, c_n, cell_states = tensors
    return _without_none(x, Outputs(y, h_n, c_n, cell_states, saved))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    call_inputs, config, options = call_of(inputs)
    y, *_, saved = output
    _, save = options
    if not save:  # backward computes y again, and the caller may change this one in place
        y = y.new_empty(0)
    ctx.config = config
    ctx.presence = _presence(config, call_inputs)
    ctx.no_grads = (None,) * (len(config) + len(options))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(call_inputs.sizes, call_inputs.reset, y, saved, *call_inputs.tensors)


def _backward_of(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    sizes, reset, y, saved, x, h0, c0, *weights = ctx.saved_tensors
    inputs = Inputs(x, h0, c0, weights, sizes, reset)
    config: StackConfig = ctx.config
    needs = ctx.needs_input_grad
    wanted = [bool(needs[0]), bool(needs[1]), bool(needs[2])]
    needs_weights = needs[3] if isinstance(needs[3], Sequence) else [needs[3]] * len(weights)
    wanted += [bool(is_wanted) for is_wanted in needs_weights]
    grads = tuple(g if is_there else None for g, is_there in zip(grads[:4], ctx.presence, strict=True))
    if torch.is_grad_enabled():  # gradients are enabled with create_graph=True
        gradients = [*autograd.differentiable(config, inputs, grads, wanted)]
    else:
        gradients = STACK_BACKWARD(*inputs, *config, y, saved, *grads, wanted)
    gradients = [g if is_wanted else None for g, is_wanted in zip(gradients, wanted, strict=True)]
    return (*gradients[:3], gradients[3:], None, None, *ctx.no_grads)


def _backward(*arguments: Any) -> list[Tensor]:
    inputs, config, (y, saved, *grads, wanted) = call_of(arguments)
    inputs, config = ops.readable(inputs), _resolved(config)
    if not saved.numel():  # the program was exported without gradients
        outputs = ops.forward(config, inputs, save=True)
        if outputs is not None and outputs.saved is not None:
            y, saved = outputs.y, outputs.saved
    elif inputs.x.is_cpu:
        saved = saved[: _saved_size(config, inputs)]
    if all(g is None for g in grads):
        grads[0] = torch.zeros_like(y)
    gradients = ops.backward(config, inputs, ops.rows(y), saved, grads, wanted)  # type: ignore[arg-type]
    if gradients is None:
        gradients = [*autograd.differentiable(config, inputs, grads, wanted, in_torch.stack)]
    return [inputs.x.new_empty(0) if g is None else g.contiguous() for g in gradients]


def _backward_fake(*arguments: Any) -> list[Tensor]:
    inputs, _, (*_, wanted) = call_of(arguments)
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format)
        if is_wanted and t is not None
        else inputs.x.new_empty(0)
        for t, is_wanted in zip(inputs.tensors, wanted, strict=True)
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
    """``rnnfast::stack`` in torch's operators; ``saved`` is empty, since torch differentiates these."""
    inputs, config, _ = call_of(arguments)
    return _without_none(inputs.x, reference.stack(config, inputs))


def _eager_backward(*arguments: Any) -> list[Tensor]:
    """``rnnfast::stack_backward`` in torch's operators."""
    inputs, config, (_, _, *grads, wanted) = call_of(arguments)
    gradients = autograd.differentiable(config, inputs, grads, wanted)
    return [inputs.x.new_empty(0) if g is None else g for g in gradients]


_PLAIN_ARGUMENTS = checks.PLAIN | {type(None), list, str, int, bool}


def _is_listened_to() -> bool:
    """Whether autograd, a mode or the profiler has to see the operators that run."""
    return bool(
        torch.is_grad_enabled()
        or torch._C._autograd._profiler_enabled()
        or torch._C._len_torch_function_stack()
        or not checks.plain_call()
    )


def _has_batched_gradients(arguments: Sequence[Any]) -> bool:
    """Whether a gradient of ``stack_backward`` is a batch of them, as with ``is_grads_batched``."""
    grads = arguments[_CONFIG + 2 : _CONFIG + 6]
    return any(type(g) is Tensor and not torch._C._has_storage(g) for g in grads)


def _shorten(
    overload: Any,
    kernel: Callable[..., Any],
    eager: Callable[..., Any],
    needs_eager: Callable[[Sequence[Any]], bool],
) -> None:
    """Make calls of compiled programs run ``kernel`` without the dispatcher, if nothing needs it.

    The dispatcher takes at least as long as the kernel of a small layer. ``eager`` computes a call if
    ``needs_eager`` of its arguments: the dispatcher does not know how to batch a Python operator, and
    under forward-mode differentiation silently treats it as constant.
    """
    dispatch = getattr(overload, "_op", None)
    if dispatch is None:
        return

    def call(*args: Any, **options: Any) -> Any:
        if not options and needs_eager(args):
            return eager(*args)
        is_plain = len(args) > 3 and not options and _PLAIN_ARGUMENTS.issuperset(map(type, args))
        if is_plain and not _is_listened_to() and checks.PLAIN.issuperset(map(type, args[3])):
            try:
                return kernel(*args)
            except (TypeError, ValueError, RuntimeError):
                pass  # uncovered or invalid arguments: the dispatcher raises the right error
        return dispatch(*args, **options)

    overload._op = call


STACK: Any = torch.ops.rnnfast.stack.default
STACK_BACKWARD: Any = torch.ops.rnnfast.stack_backward.default
_shorten(STACK, _forward, _eager, lambda _: checks.transformed())
_shorten(STACK_BACKWARD, _backward, _eager_backward, _has_batched_gradients)
