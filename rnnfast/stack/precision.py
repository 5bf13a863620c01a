"""In which dtype a call is computed, under ``torch.autocast`` too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C import _is_any_autocast_enabled

from .._native import _cuda
from . import checks

_HALVES = (torch.bfloat16, torch.float16)
_AUTOCAST_FROM = {torch.float32, torch.bfloat16, torch.float16}

#: Whether autocast is on for any kind of device: cheaper to ask than :func:`autocasts`.
may_autocast = _is_any_autocast_enabled


class Precision(NamedTuple):
    """In which dtype the kernels compute, and which one the results have."""

    compute: torch.dtype
    h: torch.dtype
    c: torch.dtype


def autocasts(device: str = "cpu") -> bool:
    """Whether ``torch.autocast`` may change what a call on such a device computes in."""
    return may_autocast() and torch.is_autocast_enabled(device)


def choose(
    x: Tensor,
    states: Sequence[Tensor | None],
    weights: Sequence[Tensor | None],
    lowers_h: bool,
    lowers_c: bool,
) -> Precision | None:
    """The dtypes of a call; None where the kernels do not take these tensors.

    They take dense tensors of no subclass, all on the CPU, or all on one CUDA device if its kernels
    were built. Without autocast all must have one dtype. The CPU computes float16 through float32.

    Under autocast the tensors are cast as torch casts them. A state that torch does not lower has the
    dtype to which torch promotes autocast's dtype and the dtype of the last of ``states`` (of ``x``
    where there is none). On CUDA, cuDNN lowers both states.

    Args:
        x: the input.
        states: h0, and c0 for a cell that has one; None for zeros.
        weights: all weights.
        lowers_h: whether torch returns h in autocast's dtype.
        lowers_c: whether torch returns c in autocast's dtype.

    """
    there = [t for t in states if t is not None]
    tensors = [x, *there, *(t for t in weights if t is not None)]
    if not all((checks.traced() or type(t) in checks.PLAIN_TYPES) and _has_memory(t) for t in tensors):
        return None
    dtypes = {t.dtype for t in tensors}
    device = x.device
    if any(t.device != device for t in tensors):
        return None
    on_cuda = device.type == "cuda"
    if autocasts(device.type) and dtypes <= _AUTOCAST_FROM:
        lower = torch.get_autocast_dtype(device.type)
        if lower not in _HALVES:
            return None
        if on_cuda:
            return Precision(lower, lower, lower)
        kept = torch.promote_types(lower, (there[-1] if there else x).dtype)
        return Precision(_computes_in(lower), lower if lowers_h else kept, lower if lowers_c else kept)
    if len(dtypes) > 1 or x.dtype not in (*checks.DTYPES, torch.float16):
        return None
    return Precision(x.dtype if on_cuda else _computes_in(x.dtype), x.dtype, x.dtype)


def _computes_in(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float16 else dtype


def _has_memory(t: Tensor) -> bool:
    if t.layout != torch.strided or t.is_nested:
        return False
    return t.device.type == "cpu" or (t.is_cuda and _cuda is not None)
