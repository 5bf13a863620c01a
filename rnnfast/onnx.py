"""ONNX's own LSTM, GRU and RNN nodes for ``torch.onnx.export(model, ..., dynamo=True)``.

The exporter finds the translation by itself. Where a version of torch hides the table that it reads, it
can be given by hand: ``custom_translation_table=rnnfast.onnx.translations()``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from . import library, when_imported
from .ops import CELLS, Spec

__all__ = ["translations"]

_REGISTRATION = "torch.onnx._internal.exporter._registration"

_INT32 = 6  # TensorProto.INT32


def translations() -> dict[Any, Callable[..., Any]]:
    """What ``torch.onnx.export`` takes as ``custom_translation_table``."""
    return {library.STACK: _stack}


def register() -> None:
    """Tell the exporter of them, as soon as it is imported."""
    when_imported.call(_REGISTRATION, _add)


def _add(registration: Any) -> None:
    register = getattr(getattr(registration, "_torchlib_registry", None), "onnx_impl", None)
    if register is not None:
        for target, function in translations().items():
            register(target, trace_only=True)(function)


def _stack(
    x: Any,
    h0: Any,
    c0: Any,
    weights: Sequence[Any],
    reset: Any,
    sizes: Any,
    batch: Any,
    cell: str,
    layers: int,
    directions: int,
    bias: bool,
    projected: bool,
    batch_first: bool,
    cells: bool,
    save: bool,
) -> tuple[Any, ...]:
    """``rnnfast::stack``, with its five results; nothing reads the last, what a backward would."""
    from onnxscript import opset18 as op

    for there, what in (
        (projected, "proj_size"),
        (reset is not None, "reset="),
        (sizes is not None and len(x.shape) == 2, "packed sequences"),
        (cells, "return_cell_states="),
    ):
        if there:
            raise ValueError(f"ONNX's {CELLS[cell].onnx.op} has no counterpart of {what}")
    spec = Spec(cell, layers, directions, bias, projected, batch_first)
    is_step = len(x.shape) == 2
    if is_step:
        x = op.Unsqueeze(x, op.Constant(value_ints=[0]))
        h0, c0 = (s if s is None else op.Unsqueeze(s, op.Constant(value_ints=[0])) for s in (h0, c0))
    elif batch_first:
        x = op.Transpose(x, perm=[1, 0, 2])
    lengths = None if sizes is None else op.Cast(sizes, to=_INT32)  # ONNX's type for them
    h_n, c_n = [], []
    for k in range(layers):
        x, h, c = _layer(op, spec, k, x, lengths, h0, c0, weights)
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
    y = op.Transpose(x, perm=[1, 0, 2]) if batch_first else x
    return y, joined(h_n), joined(c_n), none, none


def _layer(
    op: Any, spec: Spec, k: int, x: Any, lengths: Any, h0: Any, c0: Any, weights: Sequence[Any]
) -> tuple[Any, Any, Any]:
    """One node: ``x [T, B, I]`` to y ``[T, B, D * H]``, h_n and c_n ``[D, B, H]``; ``lengths [B]``."""
    kind, order, activation, linear_before_reset = CELLS[spec.cell].onnx
    directions = spec.directions
    attributes: dict[str, Any] = {}
    if linear_before_reset is not None:
        attributes["linear_before_reset"] = linear_before_reset
    if activation is not None:
        attributes["activations"] = [activation] * directions
    flat = [spec.weights(weights, k * directions + d) for d in range(directions)]
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
        if states is None or spec.layers == 1:
            return states
        return cut(states, k * directions, (k + 1) * directions)

    biases = None
    if spec.bias:
        biases = both([op.Concat(in_order(w[2]), in_order(w[3]), axis=1) for w in flat])
    w_ih, w_hh = both([in_order(w[0]) for w in flat]), both([in_order(w[1]) for w in flat])
    given = [x, w_ih, w_hh, biases, lengths, part(h0)] + ([part(c0)] if spec.has_c else [])
    y, *states = getattr(op, kind)(
        *given,
        hidden_size=hidden,
        direction="bidirectional" if directions == 2 else "forward",
        **attributes,
    )
    # [T, D, B, H] to [T, B, D * H]
    y = op.Reshape(op.Transpose(y, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, -1]))
    return y, states[0], states[1] if spec.has_c else None
