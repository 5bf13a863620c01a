"""The dtypes of a call, also under ``torch.autocast``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C import _get_float32_matmul_precision, _is_any_autocast_enabled

from .._native import _C, _cuda
from . import checks

_HALVES = (torch.bfloat16, torch.float16)
_AUTOCAST_FROM = {torch.float32, torch.bfloat16, torch.float16}

#: Whether autocast is enabled for any kind of device; faster than :func:`autocasts`.
may_autocast = _is_any_autocast_enabled


_FLOAT32 = {"highest": 0, "high": 1, "medium": 2}
_OF_BACKEND = {"tf32": 1, "bf16": 2}
#: Whether there are kernels that a lower precision of float32 makes faster.
_HAS_FASTER_FLOAT32 = any(isa.startswith("amx") for isa in _C.supported_isas())


def float32_setting() -> int:
    """What ``torch.set_float32_matmul_precision`` allows in products of float32.

    0, "highest": as exact as float32 multiply-adds. 1, "high": numbers are split into two bfloat16
    parts (an rms error of 4.5e-6 of a sum). 2, "medium": they are rounded to bfloat16 (2.4e-3). Sums
    are in float32. Only a matrix unit is faster with less; without one this is always 0.

    torch refuses to tell the setting where its newer one, ``fp32_precision`` of a backend, differs from
    it, for example of CUDA. Then that of the CPU's products counts.
    """
    if not _HAS_FASTER_FLOAT32:
        return 0
    try:
        return _FLOAT32[_get_float32_matmul_precision()]
    except RuntimeError:
        return _OF_BACKEND.get(torch.backends.mkldnn.matmul.fp32_precision, 0)  # type: ignore[attr-defined]


def of_float32(*, may_trace: bool) -> int:
    """:func:`float32_setting`; -1 in a graph of torch.compile, which reads the setting when it runs."""
    if may_trace and _HAS_FASTER_FLOAT32 and torch.compiler.is_compiling():
        return -1
    return float32_setting()


class Precision(NamedTuple):
    """The dtype in which the kernels compute, and the dtypes of the results h and c."""

    compute: torch.dtype
    h: torch.dtype
    c: torch.dtype


def autocasts(device: str = "cpu") -> bool:
    """Whether ``torch.autocast`` is enabled for this kind of device."""
    return may_autocast() and torch.is_autocast_enabled(device)


def choose(
    x: Tensor,
    states: Sequence[Tensor | None],
    weights: Sequence[Tensor | None],
    lowers_h: bool,
    lowers_c: bool,
) -> Precision | None:
    """The dtypes of a call; None if the kernels do not take these tensors.

    The kernels take strided tensors of no subclass, all on the CPU, or all on one CUDA device if the
    CUDA kernels were built. Without autocast all tensors must have the same dtype. On the CPU
    float16 is computed in float32.

    Under autocast the tensors are cast as torch casts them. To lower means to return a result in
    autocast's dtype. A result that torch does not lower has the type promotion of autocast's dtype with
    the dtype of the last state in ``states``, or of ``x`` if there are no states. On CUDA, cuDNN lowers
    both h and c.

    Args:
        x: the input.
        states: h0, and c0 for a cell with a cell state; None for a state that is zero.
        weights: all weights.
        lowers_h: whether torch returns h in autocast's dtype.
        lowers_c: whether torch returns c in autocast's dtype.

    """
    state_tensors = [t for t in states if t is not None]
    tensors = [x, *state_tensors, *(t for t in weights if t is not None)]
    device, dtypes, is_traced = x.device, set(), checks.traced()
    for t in tensors:  # a loop: Dynamo traces each item of a generator expression as a call
        if not ((is_traced or type(t) in checks.PLAIN_TYPES) and _has_memory(t)) or t.device != device:
            return None
        dtypes.add(t.dtype)
    on_cuda = device.type == "cuda"
    if autocasts(device.type) and dtypes <= _AUTOCAST_FROM:
        low = torch.get_autocast_dtype(device.type)
        if low not in _HALVES:
            return None
        if on_cuda:
            return Precision(low, low, low)
        promoted = torch.promote_types(low, (state_tensors[-1] if state_tensors else x).dtype)
        return Precision(
            _computes_in(low), low if lowers_h else promoted, low if lowers_c else promoted
        )
    if len(dtypes) > 1 or x.dtype not in (*checks.DTYPES, torch.float16):
        return None
    return Precision(x.dtype if on_cuda else _computes_in(x.dtype), x.dtype, x.dtype)


def _computes_in(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float16 else dtype


def _has_memory(t: Tensor) -> bool:
    if t.layout != torch.strided or t.is_nested:
        return False
    return t.device.type == "cpu" or (t.is_cuda and _cuda is not None)
