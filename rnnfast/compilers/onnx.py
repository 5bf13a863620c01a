"""ONNX's own LSTM, GRU and RNN nodes for ``torch.onnx.export(model, ..., dynamo=True)``.

The exporter finds the translation by itself. Where a version of torch hides the table that it reads, it
can be given by hand: ``custom_translation_table=rnnfast.onnx.translations()``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from ..stack.config import CELLS, Inputs, StackConfig
from . import operator

__all__ = ["translations"]

#: The exporter's module that holds the translations.
REGISTRATION = "torch.onnx._internal.exporter._registration"

_INT32 = 6  # TensorProto.INT32


# The exporter reads it: what is annotated with a plain type is an attribute, all else is a tensor.
_SIGNATURE = inspect.Signature(
    [
        inspect.Parameter(
            name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            annotation=kind if kind in (str, int, bool) else Any,
        )
        for name, kind in (*operator.FIELDS.items(), ("batch", Any), ("save", bool))
    ]
)


def translations() -> dict[Any, Callable[..., Any]]:
    """What ``torch.onnx.export`` takes as ``custom_translation_table``."""
    return {operator.STACK: _stack}


def add_to(registration: Any) -> None:
    """Tell the exporter of them."""
    register = getattr(getattr(registration, "_torchlib_registry", None), "onnx_impl", None)
    if register is not None:
        for target, function in translations().items():
            register(target, trace_only=True)(function)


def _stack(*arguments: Any, **attributes: Any) -> tuple[Any, ...]:
    """``rnnfast::stack``, with its five results; nothing reads the last, what a backward would."""
    from onnxscript import opset18 as op

    inputs, config, _ = operator.call_of(_SIGNATURE.bind(*arguments, **attributes).args)
    x, h0, c0, _, sizes, reset = inputs
    for there, what in (
        (config.projected, "proj_size"),
        (reset is not None, "reset="),
        (sizes is not None and len(x.shape) == 2, "packed sequences"),
        (config.cell_states, "return_cell_states="),
    ):
        if there:
            raise ValueError(f"ONNX's {CELLS[config.cell].onnx.op} has no counterpart of {what}")
    is_step = len(x.shape) == 2
    if is_step:
        x = op.Unsqueeze(x, op.Constant(value_ints=[0]))
        h0, c0 = (s if s is None else op.Unsqueeze(s, op.Constant(value_ints=[0])) for s in (h0, c0))
    elif config.batch_first:
        x = op.Transpose(x, perm=[1, 0, 2])
    lengths = None if sizes is None else op.Cast(sizes, to=_INT32)  # ONNX's type for them
    h_n, c_n = [], []
    for k in range(config.layers):
        x, h, c = _layer(op, config, k, x, lengths, inputs._replace(h0=h0, c0=c0))
        h_n.append(h)
        c_n.append(c)
    none = op.Constant(value_floats=[])

    def joined(states: list[Any]) -> Any:
        if states[0] is None:
            return none
        return states[0] if len(states) == 1 else op.Concat(*states, axis=0)

    if is_step:
        first = op.Constant(value_ints=[0])
        y, c = op.Squeeze(x, first), none if c_n[0] is None else op.Squeeze(c_n[0], first)
        return y, none, c, none, none
    y = op.Transpose(x, perm=[1, 0, 2]) if config.batch_first else x
    return y, joined(h_n), joined(c_n), none, none


_stack.__signature__ = _SIGNATURE  # type: ignore[attr-defined]
_stack.__annotations__ = {name: p.annotation for name, p in _SIGNATURE.parameters.items()}


def _layer(
    op: Any, config: StackConfig, k: int, x: Any, lengths: Any, inputs: Inputs
) -> tuple[Any, Any, Any]:
    """One node: ``x [T, B, I]`` to y ``[T, B, D * H]``, h_n and c_n ``[D, B, H]``; ``lengths [B]``."""
    _, h0, c0, weights, _, _ = inputs
    kind, order, activation, linear_before_reset = CELLS[config.cell].onnx
    directions = config.directions
    attributes: dict[str, Any] = {}
    if linear_before_reset is not None:
        attributes["linear_before_reset"] = linear_before_reset
    if activation is not None:
        attributes["activations"] = [activation] * directions
    flat = [config.weights(weights, k * directions + d) for d in range(directions)]
    hidden = flat[0][1].shape[-1]

    def cut(t: Any, start: int, end: int) -> Any:
        return op.Slice(t, *(op.Constant(value_ints=[number]) for number in (start, end, 0)))

    def block(w: Any, number: int) -> Any:
        if number < 0:
            return op.Neg(block(w, ~number))
        return cut(w, number * hidden, (number + 1) * hidden)

    def in_order(w: Any) -> Any:
        """One direction's weight or bias with its gates as ONNX has them, ``[1, ...]``."""
        if len(order) > 1:  # by Slice, which the exporter computes at once
            w = op.Concat(*(block(w, number) for number in order), axis=0)
        return op.Unsqueeze(w, op.Constant(value_ints=[0]))

    def both(each: list[Any]) -> Any:
        return each[0] if len(each) == 1 else op.Concat(*each, axis=0)

    def part(states: Any) -> Any:
        if states is None or config.layers == 1:
            return states
        return cut(states, k * directions, (k + 1) * directions)

    biases = None
    if config.bias:
        biases = both([op.Concat(in_order(w[2]), in_order(w[3]), axis=1) for w in flat])
    w_ih, w_hh = both([in_order(w[0]) for w in flat]), both([in_order(w[1]) for w in flat])
    given = [x, w_ih, w_hh, biases, lengths, part(h0)] + ([part(c0)] if config.has_c else [])
    y, *states = getattr(op, kind)(
        *given,
        hidden_size=hidden,
        direction="bidirectional" if directions == 2 else "forward",
        **attributes,
    )
    # [T, D, B, H] to [T, B, D * H]
    y = op.Reshape(op.Transpose(y, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, -1]))
    return y, states[0], states[1] if config.has_c else None
