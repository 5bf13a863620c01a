"""What the kernels cover. Everything else, bad input included, is left to torch's own code, which then
gives its own answer or raises its own exception.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C import (
    _are_functorch_transforms_active,
    _dispatch_tls_is_dispatch_key_included,
    _get_tracing_state,
    _is_any_autocast_enabled,
    _len_torch_dispatch_stack,
)
from torch.autograd import forward_ad
from torch.nn import Parameter

from ._native import _cuda

#: The types that the kernels take; a subclass may mean something else by its data.
PLAIN_TYPES = (Tensor, Parameter)
PLAIN = frozenset(PLAIN_TYPES)

#: What the kernels compute in, and its name there.
DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch  # where modes look before autograd
_HALVES = (torch.bfloat16, torch.float16)
_AUTOCAST_FROM = {torch.float32, torch.bfloat16, torch.float16}


#: Whether torch.compile or torch.export is looking: a graph is made, and nothing is computed.
traced = torch.compiler.is_compiling

#: Whether autocast is on for any kind of device: cheaper to ask than :func:`autocasts`.
may_autocast = _is_any_autocast_enabled


def plain_call() -> bool:
    """Whether tensors are just tensors now: no tracing, transform or mode is at work."""
    return not (
        traced()
        or _get_tracing_state()
        or _are_functorch_transforms_active()
        or _len_torch_dispatch_stack()
        or _dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH)
        or forward_ad._current_level >= 0
    )


def transformed() -> bool:
    """Whether a transform of torch.func, or forward mode, is at work."""
    return bool(_are_functorch_transforms_active()) or forward_ad._current_level >= 0


class Precision(NamedTuple):
    """In which dtype the kernels compute, and which one the results have."""

    compute: torch.dtype
    h: torch.dtype
    c: torch.dtype


def autocasts(device: str = "cpu") -> bool:
    """Whether ``torch.autocast`` may change what a call on such a device computes in."""
    return may_autocast() and torch.is_autocast_enabled(device)


def precision(
    x: Tensor,
    states: Sequence[Tensor | None],
    weights: Sequence[Tensor | None],
    lowers_h: bool,
    lowers_c: bool,
) -> Precision | None:
    """For dense tensors of no subclass, all of one dtype unless autocast is on; None for others.

    They are on the CPU, or all on one CUDA device where its kernels were built. On the CPU float16 is
    computed through float32. Under autocast the tensors are cast as torch casts them, and
    h and c are in autocast's dtype where torch lowers them to that, or else in the one that it and the
    state that a step's formula adds to, the last one, are promoted to. cuDNN lowers both.
    """
    there = [t for t in states if t is not None]
    tensors = [x, *there, *(t for t in weights if t is not None)]
    if not all((traced() or type(t) in PLAIN_TYPES) and _has_memory(t) for t in tensors):
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
    if len(dtypes) > 1 or x.dtype not in (*DTYPES, torch.float16):
        return None
    return Precision(x.dtype if on_cuda else _computes_in(x.dtype), x.dtype, x.dtype)


def _computes_in(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float16 else dtype


def _has_memory(t: Tensor) -> bool:
    if t.layout != torch.strided or t.is_nested:
        return False
    return t.device.type == "cpu" or (t.is_cuda and _cuda is not None)


def lazy(t: Tensor) -> bool:
    """Whether the tensor's memory is not, or not yet, its values."""
    return t.is_neg() or t._is_zerotensor()


def readable(t: Tensor) -> Tensor:
    """The same values in memory, the last dimension contiguous; copies only if it must."""
    if lazy(t):
        t = t.resolve_neg() if t.is_neg() else torch.zeros(t.shape, dtype=t.dtype, device=t.device)
    return t if t.size(-1) <= 1 or t.stride(-1) == 1 else t.contiguous()


def packs(batch_sizes: Tensor, rows: int) -> bool:
    """Whether these are the batch sizes of a packed sequence of so many rows."""
    if batch_sizes.dtype != torch.int64 or batch_sizes.dim() != 1 or batch_sizes.is_cuda:
        return False
    if traced():  # the operator looks at the data when it runs
        return True
    sizes = batch_sizes.tolist()
    return sum(sizes) == rows and sizes[-1] > 0 and sizes == sorted(sizes, reverse=True)
