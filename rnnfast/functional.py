"""Dropout between layers: what lies between a module and the kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import autograd, checks, library
from .checks import Precision
from .ops import Outputs, Spec


def recurrent_in(
    precision: Precision | None,
    spec: Spec,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Any],
    **options: Any,
) -> Outputs | None:
    """:func:`recurrent` in another dtype; None: in that of the tensors."""
    device = x.device.type
    if precision is None or (precision.compute == precision.h and not checks.autocasts(device)):
        return recurrent(spec, x, h0, c0, weights, **options)

    def cast(t: Any, dtype: torch.dtype) -> Any:
        return t if t is None else t.to(dtype)

    x, h0, c0, *weights = (cast(t, precision.compute) for t in (x, h0, c0, *weights))
    with torch.autocast(device, enabled=False):
        found = recurrent(spec, x, h0, c0, weights, **options)
    if found is None:
        return None
    h, c = precision.h, precision.c
    return Outputs(cast(found.y, h), cast(found.h_n, h), cast(found.c_n, c), cast(found.cells, c))


def recurrent(
    spec: Spec,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Any],
    *,
    dropout: float = 0.0,
    sizes: Tensor | None = None,
    batch: int | None = None,
    reset: Tensor | None = None,
    cells: bool = False,
    fused: bool = True,
) -> Outputs | None:
    """A stack of layers, as torch's ``_VF.lstm`` and its kin compute it.

    ``x [T, B, I]`` (``[B, T, I]`` with ``spec.batch_first``), ``h0`` and ``c0 [layers * D, B, H]`` or
    None for zeros, ``weights`` flat in torch's order. Returns ``y [T, B, D * H]`` (likewise), ``h_n``
    and ``c_n [layers * D, B, H]``; ``c_n`` is None for cells without a cell state. Where h is
    projected to a width R, that stands in the place of H for ``y``, ``h0`` and ``h_n``. ``sizes`` are
    those of :func:`ops.forward`: packed, ``x`` and ``y`` are ``[rows, features]``. ``x [B, I]`` is one
    step of one layer, with states ``[B, H]``, and ``h_n`` is None. ``dropout`` is that of training.

    ``batch`` tells a graph what ``sizes[0]`` of a packed ``x`` is.

    None, having done nothing, where an argument is not what the kernels take. With ``fused=False``
    torch's operators compute it, differentiable in every way. ``reset`` and ``cells`` are those of
    :func:`ops.forward`.
    """
    run: Callable[..., Outputs | None] = autograd.stack if fused else autograd.eager_stack
    if fused and checks.traced():
        run = partial(library.stack, batch=batch)
    if dropout == 0 or spec.layers == 1:
        return run(spec, sizes, x, h0, c0, weights, reset, cells)
    one = spec._replace(layers=1, batch_first=False)
    each = spec.weights_each * spec.directions
    turned = spec.batch_first and x.dim() == 3
    y = x.transpose(0, 1) if turned else x  # as torch has it: the same masks from the same seed
    reset = reset.transpose(0, 1) if turned and reset is not None else reset
    every_c = None
    h_n: list[Tensor] = []
    c_n: list[Tensor] = []
    for k in range(spec.layers):
        part = slice(k * spec.directions, (k + 1) * spec.directions)
        result = run(
            one,
            sizes,
            F.dropout(y, dropout) if k > 0 else y,
            None if h0 is None else h0[part],
            None if c0 is None else c0[part],
            weights[k * each : (k + 1) * each],
            reset,
            cells and k == spec.layers - 1,
        )
        if result is None:
            return None
        y, h, c, every_c, _ = result
        h_n += [] if h is None else [h]
        c_n += [] if c is None else [c]
    if turned:
        y, every_c = y.transpose(0, 1), every_c if every_c is None else every_c.transpose(0, 1)
    return Outputs(y, torch.cat(h_n), torch.cat(c_n) if c_n else None, every_c)
