"""What torch.compile and torch.export see: the operators ``rnnfast::stack`` and its backward.

An eager call does not come through here, since the dispatcher would cost it as much as a small kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from . import autograd, checks, ops
from .ops import Outputs, Spec

_STACK = """stack(
    Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? reset,
    Tensor? sizes, SymInt? batch,
    str cell, int layers, int directions, bool bias, bool projected, bool batch_first,
    bool cells, bool save
) -> (Tensor y, Tensor h_n, Tensor c_n, Tensor cells, Tensor saved)"""

_BACKWARD = """stack_backward(
    Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? reset, Tensor? sizes,
    str cell, int layers, int directions, bool bias, bool projected, bool batch_first,
    Tensor y, Tensor saved, Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dcells, bool[] wanted
) -> Tensor[]"""

_LIBRARY: Any = torch.library.Library("rnnfast", "DEF")  # type: ignore[no-untyped-call]
for schema in (_STACK, _BACKWARD):
    _LIBRARY.define(" ".join(schema.split()), tags=(torch.Tag.pt2_compliant_tag,))


def stack(
    spec: Spec,
    sizes: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    reset: Tensor | None = None,
    cells: bool = False,
    batch: int | None = None,
) -> Outputs | None:
    """As :func:`autograd.stack`, as one node of a graph, for packed sequences of ``batch`` rows."""
    save = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, h0, c0, *weights)
    )
    y, h_n, c_n, every_c, _ = STACK(
        *(x, h0, c0, list(weights), reset, sizes, batch), *spec, cells, save
    )
    has_c = spec.has_c
    is_step = x.dim() == 2 and sizes is None
    return Outputs(y, None if is_step else h_n, c_n if has_c else None, every_c if cells else None)


def _forward(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    reset: Tensor | None,
    sizes: Tensor | None,
    batch: int | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    spec, (cells, save) = Spec(*rest[:6]), rest[6:]
    x, h0, c0, *weights = map(ops.rows, (x, h0, c0, *weights))  # type: ignore[assignment]
    found = ops.forward(spec, sizes, x, h0, c0, weights, save, reset, cells)
    if found is None:
        why = ops.why_not(spec, sizes, x, h0, c0, weights, reset)
        raise RuntimeError(f"rnnfast::stack got tensors that its kernels do not take: {why}")
    *outputs, saved = found
    if batch is not None and found.h_n is not None and found.h_n.size(1) != batch:
        raise RuntimeError(
            f"batch_sizes begins with {found.h_n.size(1)}; expected {batch}, the rows of the batch"
        )
    y, h_n, c_n, every_c = (x.new_empty(0) if t is None else t for t in outputs)
    return y, h_n, c_n, every_c, x.new_empty(0, dtype=torch.uint8) if saved is None else saved


def _forward_fake(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    reset: Tensor | None,
    sizes: Tensor | None,
    batch: int | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    spec, (cells, save) = Spec(*rest[:6]), rest[6:]
    outputs, hidden = spec.widths(weights)
    has_c, numbers = spec.has_c, spec.layers * spec.directions

    def empty(wanted: bool, *shape: Any) -> Tensor:
        return x.new_empty(*shape) if wanted else x.new_empty(0)

    is_step = x.dim() == 2 and sizes is None
    leading = x.shape[:-1]
    if x.dim() == 3 or is_step:
        batch = x.size(0 if spec.batch_first or is_step else 1)
    states = (batch,) if is_step else (numbers, batch)
    y = x.new_empty(*leading, spec.directions * outputs)
    h_n = empty(not is_step, *states, outputs)
    c_n = empty(has_c, *states, hidden)
    every_c = empty(cells, *leading, spec.directions * hidden)
    saved = x.new_empty(0, dtype=torch.uint8)
    if save:
        each = ops.saved_bytes_of_a_row(spec, x, int(hidden), int(outputs))
        saved = saved.new_empty(prod(leading) * each)
    return y, h_n, c_n, every_c, saved


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, h0, c0, weights, reset, sizes, _, *rest = inputs
    y, _, _, _, saved = output
    ctx.spec = rest[:6]
    has_h_n = x.dim() == 3 or sizes is not None
    ctx.there = (True, has_h_n, Spec(*rest[:6]).has_c, rest[6])  # the others are empty stand-ins
    ctx.others = (None,) * (len(inputs) - 4)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, h0, c0, reset, sizes, y, saved, *weights)


def _backward_of(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    x, h0, c0, reset, sizes, y, saved, *weights = ctx.saved_tensors
    needs = ctx.needs_input_grad
    wanted = [bool(needs[0]), bool(needs[1]), bool(needs[2])]
    each = needs[3] if isinstance(needs[3], Sequence) else [needs[3]] * len(weights)
    wanted += [bool(wants) for wants in each]
    given = [g if there else None for g, there in zip(grads[:4], ctx.there, strict=True)]
    if torch.is_grad_enabled():  # a graph of this backward is wanted
        inputs = (x, h0, c0, *weights)
        again = autograd.differentiable(Spec(*ctx.spec), sizes, reset, inputs, given, wanted)
        return (*again[:3], [*again[3:]], *ctx.others)
    found = STACK_BACKWARD(*(x, h0, c0, weights, reset, sizes), *ctx.spec, y, saved, *given, wanted)
    own = [g if wants else None for g, wants in zip(found, wanted, strict=True)]
    return (*own[:3], own[3:], *ctx.others)


def _backward(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    reset: Tensor | None,
    sizes: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    spec = Spec(*rest[:6])
    y, saved, *grads, wanted = rest[6:]
    inputs = tuple(map(ops.rows, (x, h0, c0, *weights)))
    if all(g is None for g in grads):
        grads[0] = torch.zeros_like(y)
    if not saved.numel() and y.numel():  # it was exported where no gradients were wanted
        x, h0, c0, *weights = inputs  # type: ignore[assignment]
        again = ops.forward(spec, sizes, x, h0, c0, weights, True, reset)
        assert again is not None
        assert again.saved is not None
        y, saved = again.y, again.saved
    found = ops.backward(spec, sizes, reset, inputs, ops.rows(y), saved, grads, wanted)  # type: ignore[arg-type]
    if found is None:
        found = [*autograd.differentiable(spec, sizes, reset, inputs, grads, wanted)]
    return [x.new_empty(0) if g is None else g for g in found]


def _backward_fake(
    x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: list[Tensor], *rest: Any
) -> list[Tensor]:
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format)
        if wants and t is not None
        else x.new_empty(0)
        for t, wants in zip((x, h0, c0, *weights), rest[-1], strict=True)
    ]


for device in ("CPU", "CUDA"):
    _LIBRARY.impl("stack", _forward, device)
    _LIBRARY.impl("stack_backward", _backward, device)
torch.library.register_fake("rnnfast::stack", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("rnnfast::stack_backward", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd(
    "rnnfast::stack", _backward_of, setup_context=_setup_context, lib=_LIBRARY
)


def _eager(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    reset: Tensor | None,
    sizes: Tensor | None,
    batch: int | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    """``rnnfast::stack`` on torch's operators; ``saved`` is empty, since nothing needs it."""
    y, h_n, c_n, every_c, _ = autograd.eager_stack(
        Spec(*rest[:6]), sizes, x, h0, c0, weights, reset, rest[6]
    )
    outputs = (x.new_empty(0) if t is None else t for t in (y, h_n, c_n, every_c))
    return *outputs, x.new_empty(0, dtype=torch.uint8)


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
