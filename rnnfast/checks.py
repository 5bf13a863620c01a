"""What the kernels cover. Everything else, bad input included, is left to torch's own code, which then
gives its own answer or raises its own exception.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

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
    if not (
        type(first) in (Tensor, Parameter)
        and first.dtype in _DTYPES
        and first.device.type == "cpu"
        and first.layout == torch.strided
    ):
        return False
    return all(
        t is None
        or (
            type(t) in (Tensor, Parameter)
            and t.dtype == first.dtype
            and t.device.type == "cpu"
            and t.layout == torch.strided
        )
        for t in others
    )
