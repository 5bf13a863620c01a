"""What the kernels cover. Everything else, bad input included, is left to torch's own code, which then
gives its own answer or raises its own exception.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

#: The types that the kernels take; a subclass may mean something else by its data.
PLAIN_TYPES = (Tensor, Parameter)

_DTYPES = (torch.float32, torch.float64)


def plain_call() -> bool:
    """Whether tensors are just tensors now: no tracing, transform, autocast or mode is at work."""
    return not (
        torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
        or torch._C._get_tracing_state()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or forward_ad._current_level >= 0
    )


def plain_tensors(first: Tensor, others: Sequence[Tensor | None]) -> bool:
    """Whether all are dense CPU tensors of one dtype that the kernels know, and no subclass."""
    return first.dtype in _DTYPES and all(
        t is None or (type(t) in PLAIN_TYPES and t.dtype == first.dtype and _has_memory(t))
        for t in (first, *others)
    )


def _has_memory(t: Tensor) -> bool:
    return t.device.type == "cpu" and t.layout == torch.strided and not t.is_nested


def lazy(t: Tensor) -> bool:
    """Whether the tensor's memory is not, or not yet, its values."""
    return t.is_neg() or t._is_zerotensor()


def packs(batch_sizes: Tensor, rows: int) -> bool:
    """Whether these are the batch sizes of a packed sequence of so many rows."""
    if batch_sizes.dtype != torch.int64 or batch_sizes.dim() != 1 or batch_sizes.is_cuda:
        return False
    sizes = batch_sizes.tolist()
    return sum(sizes) == rows and sizes[-1] > 0 and sizes == sorted(sizes, reverse=True)
