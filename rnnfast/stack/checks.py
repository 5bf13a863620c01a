"""Checks of a call (plain, traced or transformed), and of memory that the kernels can read."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import (
    _are_functorch_transforms_active,
    _dispatch_tls_is_dispatch_key_included,
    _get_tracing_state,
    _len_torch_dispatch_stack,
)
from torch.autograd import forward_ad
from torch.nn import Parameter

#: The types that the kernels take. The data of a subclass may have another meaning.
PLAIN_TYPES = (Tensor, Parameter)
PLAIN = frozenset(PLAIN_TYPES)

#: The dtypes in which the kernels compute, and their names in the extension.
DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch  # the key of modes that run before autograd

#: Whether torch.compile or torch.export is tracing: a graph is made, and nothing is computed.
traced = torch.compiler.is_compiling


def plain_call() -> bool:
    """Whether no tracing, transform or mode is active."""
    return not (
        traced()
        or _get_tracing_state()
        or _are_functorch_transforms_active()
        or _len_torch_dispatch_stack()
        or _dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH)
        or forward_ad._current_level >= 0
    )


def transformed() -> bool:
    """Whether a transform of torch.func, or forward-mode differentiation, is active."""
    return bool(_are_functorch_transforms_active()) or forward_ad._current_level >= 0


def lazy(t: Tensor) -> bool:
    """Whether the tensor's memory does not contain its values: a lazy negation, or lazy zeros."""
    return t.is_neg() or t._is_zerotensor()


def readable(t: Tensor) -> Tensor:
    """The tensor, or a copy if the kernels cannot read the tensor: the last dimension is contiguous."""
    if lazy(t):
        t = t.resolve_neg() if t.is_neg() else torch.zeros(t.shape, dtype=t.dtype, device=t.device)
    return t if t.size(-1) <= 1 or t.stride(-1) == 1 else t.contiguous()


def packs(batch_sizes: Tensor, rows: int) -> bool:
    """Whether ``batch_sizes`` is valid for a packed sequence whose data has ``rows`` rows."""
    if batch_sizes.dtype != torch.int64 or batch_sizes.dim() != 1 or batch_sizes.is_cuda:
        return False
    if traced():  # the operator checks the values when it runs
        return True
    sizes = batch_sizes.tolist()
    return sum(sizes) == rows and sizes[-1] > 0 and sizes == sorted(sizes, reverse=True)
