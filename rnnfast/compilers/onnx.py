"""ONNX's own LSTM, GRU and RNN nodes for ``torch.onnx.export(model, ..., dynamo=True)``.

The exporter normally finds the translation by itself. If it does not, in an unknown version of torch,
pass ``custom_translation_table=rnnfast.onnx.translations()`` to ``torch.onnx.export``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from ..stack.config import CELLS, Inputs, StackConfig
from . import operator

__all__ = ["translations"]

#: The exporter's module with the table of translations.
REGISTRATION = "torch.onnx._internal.exporter._registration"

_INT32 = 6  # TensorProto.INT32


# The exporter reads this signature: a parameter annotated with str, int or bool is an attribute, any
# other one is a tensor.
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
    """The argument ``custom_translation_table`` of ``torch.onnx.export`` for rnnfast's modules."""
    return {operator.STACK: _stack}


def add_to(registration: Any) -> None:
    """Add the translations to the exporter's table."""
    register = getattr(getattr(registration, "_torchlib_registry", None), "onnx_impl", None)
    if register is not None:
        for target, function in translations().items():
            register(target, trace_only=True)(function)


def _stack(*arguments: Any, **attributes: Any) -> tuple[Any, ...]:
    """Translate ``rnnfast::stack``, with its five results; ``saved``, the fifth, is never read."""
    from onnxscript import opset18 as op

    inputs, config, _ = operator.call_of(_SIGNATURE.bind(*arguments, **attributes).args)
    x, h0, c0, _, sizes, reset = inputs
    for is_used, feature in (
        (config.projected, "proj_size"),
        (reset is not None, "reset="),
        (sizes is not None and len(x.shape) == 2, "packed sequences"),
        (config.cell_states, "return_cell_states="),
        (getattr(x.dtype, "name", None) == "BFLOAT16", "bfloat16"),
    ):
        if is_used:
            raise ValueError(f"ONNX's {CELLS[config.cell].onnx.op} has no counterpart of {feature}")
    is_step = len(x.shape) == 2
    if is_step:
        x = op.Unsqueeze(x, op.Constant(value_ints=[0]))
        h0, c0 = (s if s is None else op.Unsqueeze(s, op.Constant(value_ints=[0])) for s in (h0, c0))
    elif config.batch_first:
        x = op.Transpose(x, perm=[1, 0, 2])
    lengths = None if sizes is None else op.Cast(sizes, to=_INT32)  # ONNX's type of sequence_lens
    h_n, c_n = [], []
    for k in range(config.layers):
        x, h, c = _layer(op, config, k, x, lengths, inputs._replace(h0=h0, c0=c0))
        h_n.append(h)
        c_n.append(c)
    empty = op.Constant(value_floats=[])

    def joined(states: list[Any]) -> Any:
        if states[0] is None:
            return empty
        return states[0] if len(states) == 1 else op.Concat(*states, axis=0)

    if is_step:
        first = op.Constant(value_ints=[0])
        y, c = op.Squeeze(x, first), empty if c_n[0] is None else op.Squeeze(c_n[0], first)
        return y, empty, c, empty, empty
    y = op.Transpose(x, perm=[1, 0, 2]) if config.batch_first else x
    return y, joined(h_n), joined(c_n), empty, empty


_stack.__signature__ = _SIGNATURE  # type: ignore[attr-defined]
_stack.__annotations__ = {name: p.annotation for name, p in _SIGNATURE.parameters.items()}


def _layer(
    op: Any, config: StackConfig, k: int, x: Any, lengths: Any, inputs: Inputs
) -> tuple[Any, Any, Any]:
    """One ONNX node: from ``x [T, B, I]`` to y ``[T, B, D * H]``, h_n and c_n ``[D, B, H]``."""
    _, h0, c0, weights, sizes, _ = inputs
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
        """The weight or bias of one direction with its gates in ONNX's order, ``[1, ...]``."""
        if len(order) > 1:  # the exporter folds Slice of a constant
            w = op.Concat(*(block(w, number) for number in order), axis=0)
        return op.Unsqueeze(w, op.Constant(value_ints=[0]))

    def joined(parts: list[Any]) -> Any:
        return parts[0] if len(parts) == 1 else op.Concat(*parts, axis=0)

    def part(states: Any) -> Any:
        if states is None or config.layers == 1:
            return states
        return cut(states, k * directions, (k + 1) * directions)

    def final(state: Any, initial: Any) -> Any:
        """The last state of each row. A row of length 0 has its initial state; in ONNX it has zeros."""
        if sizes is None or initial is None:
            return state
        is_empty = op.Equal(sizes, op.Constant(value_ints=[0]))
        return op.Where(op.Unsqueeze(is_empty, op.Constant(value_ints=[1])), part(initial), state)

    biases = None
    if config.bias:
        biases = joined([op.Concat(in_order(w[2]), in_order(w[3]), axis=1) for w in flat])
    w_ih, w_hh = joined([in_order(w[0]) for w in flat]), joined([in_order(w[1]) for w in flat])
    operands = [x, w_ih, w_hh, biases, lengths, part(h0)] + ([part(c0)] if config.has_c else [])
    y, *states = getattr(op, kind)(
        *operands,
        hidden_size=hidden,
        direction="bidirectional" if directions == 2 else "forward",
        **attributes,
    )
    # [T, D, B, H] to [T, B, D * H]
    y = op.Reshape(op.Transpose(y, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, -1]))
    return y, final(states[0], h0), final(states[1], c0) if config.has_c else None
