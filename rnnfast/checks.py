"""What the kernels cover. Everything else, bad input included, is left to torch's own code, which then
gives its own answer or raises its own exception.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

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
from torch.nn.utils.rnn import PackedSequence

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


def autocasts() -> bool:
    """Whether ``torch.autocast("cpu")`` may change what a call computes in."""
    return may_autocast() and torch.is_autocast_enabled("cpu")


def precision(
    x: Tensor,
    states: Sequence[Tensor | None],
    weights: Sequence[Tensor | None],
    lowers_h: bool,
    lowers_c: bool,
) -> Precision | None:
    """For dense CPU tensors of no subclass, all of one dtype unless autocast is on; None for others.

    float16 is computed through float32. Under autocast the tensors are cast as torch casts them, and
    h and c are in autocast's dtype where torch lowers them to that, or else in the one that it and the
    state that a step's formula adds to, the last one, are promoted to.
    """
    there = [t for t in states if t is not None]
    tensors = [x, *there, *(t for t in weights if t is not None)]
    if not all((traced() or type(t) in PLAIN_TYPES) and _has_memory(t) for t in tensors):
        return None
    dtypes = {t.dtype for t in tensors}
    if autocasts() and dtypes <= _AUTOCAST_FROM:
        lower = torch.get_autocast_dtype("cpu")
        if lower not in _HALVES:
            return None
        kept = torch.promote_types(lower, (there[-1] if there else x).dtype)
        return Precision(_computes_in(lower), lower if lowers_h else kept, lower if lowers_c else kept)
    if len(dtypes) > 1 or x.dtype not in (*DTYPES, torch.float16):
        return None
    return Precision(_computes_in(x.dtype), x.dtype, x.dtype)


def _computes_in(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float16 else dtype


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


def reset_rows(input: Tensor | PackedSequence, reset: Any, batch_first: bool) -> Tensor:
    """``reset`` with one bool for every row of ``input``: that of a PackedSequence's data.

    Raises:
        TypeError: it is no tensor of bools.
        ValueError: it lies elsewhere than ``input``, or has not its shape without the features.
    """
    given = reset.data if isinstance(reset, PackedSequence) else reset
    if not isinstance(given, Tensor) or given.dtype != torch.bool:
        what = given.dtype if isinstance(given, Tensor) else type(given).__name__
        raise TypeError(f"reset must be a Tensor of torch.bool, got {what}")
    data = input.data if isinstance(input, PackedSequence) else input
    if given.device != data.device or given.layout != torch.strided:
        raise ValueError(
            f"reset is {given.layout} on {given.device}; expected {torch.strided} on {data.device}"
        )
    if isinstance(reset, PackedSequence):
        if not isinstance(input, PackedSequence) or not torch.equal(
            reset.batch_sizes, input.batch_sizes
        ):
            raise ValueError("reset is a PackedSequence, but not one packed as input is")
        return given
    if not isinstance(input, PackedSequence):
        if given.shape != input.shape[:-1]:
            raise ValueError(
                f"reset has shape {tuple(given.shape)}; expected {tuple(input.shape[:-1])}, that of "
                "input without its features"
            )
        return given
    sizes, order = input.batch_sizes, input.sorted_indices
    steps, batch = len(sizes), int(sizes[0])
    expected = (batch, steps) if batch_first else (steps, batch)
    if given.shape != expected:
        raise ValueError(
            f"reset has shape {tuple(given.shape)}; expected {expected}, that of the padded input "
            "without its features"
        )
    given = given.transpose(0, 1) if batch_first else given
    given = given if order is None else given.index_select(1, order)
    return given[torch.arange(batch) < sizes[:, None]]
