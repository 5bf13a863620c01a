"""A stack of layers on torch tensors, computed by the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._native import _C
from . import checks, cuda
from .checks import PLAIN_TYPES
from .config import CELLS, Inputs, Outputs, StackConfig

__all__ = [
    "backward",
    "call_module",
    "forward",
    "pack",
    "readable",
    "rows",
    "saved_bytes_of_a_row",
    "stack_of",
    "why_not",
]


class _Stacks(dict[StackConfig, Any]):
    """The extension's object for each configuration, made at the first use."""

    def __missing__(self, config: StackConfig) -> Any:
        fields = config._asdict() | {"cell": CELLS[config.cell].number}
        stack = self[config] = _C.Stack(**fields)
        return stack


_STACKS = _Stacks()


def stack_of(config: StackConfig) -> Any:
    """The extension's object of a configuration."""
    return _STACKS[config]


def rows(t: Tensor | None) -> Tensor | None:
    """The tensor, or a copy if the kernels cannot read the tensor: the last dimension is contiguous."""
    return t if t is None else checks.readable(t)


def readable(inputs: Inputs) -> Inputs:
    """The inputs with :func:`rows` of all tensors. In a graph the operator does this when it runs."""
    return inputs if checks.traced() else inputs.with_tensors(map(rows, inputs.tensors))


def _as_tensor(memory: Any) -> Tensor:
    if memoryview(memory).nbytes == 0:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    return torch.frombuffer(memory, dtype=torch.uint8)


def saved_bytes_of_a_row(config: StackConfig, x: Tensor, hidden: int, outputs: int) -> int:
    """The bytes of ``Outputs.saved`` for each row of ``x``."""
    if x.is_cuda:
        return cuda.saved_bytes_of_a_row(config, x.dtype, hidden)
    memory = _STACKS[config].new_saved(checks.DTYPES[x.dtype], 1, hidden, outputs)
    return memoryview(memory).nbytes


def forward(
    config: StackConfig, inputs: Inputs, save: bool = False, packed: Any = None
) -> Outputs | None:
    """Run a stack; None, with no effect, if the kernels do not take the inputs.

    Steps past a row's length are neither read nor computed. Their outputs are zero.

    Args:
        config: the stack.
        inputs: as :class:`Inputs` describes them; ``weights`` must be a list.
        save: whether to save what :func:`backward` needs.
        packed: None, or the result of :func:`pack` for the same weights.

    Raises:
        RuntimeError: the number or the shapes of the weights do not fit the stack.

    """
    try:
        stack = _STACKS[config]
    except (KeyError, ValueError):  # no such cell, or not with these options
        return None
    threads, new_saved = torch.get_num_threads(), _as_tensor if save else None
    try:
        outputs = stack.call(PLAIN_TYPES, threads, inputs, new_saved, packed)
    except ValueError as error:  # for weights of a wrong shape torch raises RuntimeError
        raise RuntimeError(str(error)) from None
    if outputs is not None:
        return tuple.__new__(Outputs, outputs)
    if inputs.x.is_cuda:
        return cuda.forward(config, inputs, save)
    return None


def why_not(config: StackConfig, inputs: Inputs) -> str:
    """What is wrong with the inputs on the CPU for which :func:`forward` returned None."""
    # The output is empty, so that the call fails even if the inputs are right.
    outputs = (inputs.x.new_empty(0), None, None, None, None)
    try:
        _STACKS[config].forward(torch.get_num_threads(), inputs, outputs)
    except Exception as error:
        return str(error)
    raise AssertionError("it took an output of no size")


def call_module(
    config: StackConfig,
    inputs: tuple[Any, Any, dict[str, Any], Sequence[str], Any, Any, list[Any] | None],
    dims: int,
    features: Any,
    packed: Any,
) -> Any:
    """:func:`forward` for a module without gradients; returns the result of the module's ``forward``.

    ``inputs`` are ``(x, hx, parameters, names, sizes, reset, flat)``, as a module has them. Returns
    None, with no effect, also if a parameter is missing or is not the object in the list ``flat``, or
    if ``x`` does not have ``dims`` dimensions and ``features`` features.
    """
    try:
        stack = _STACKS[config]
    except (KeyError, ValueError):
        return None
    threads = torch.get_num_threads()
    try:
        return stack.call_module(PLAIN_TYPES, threads, inputs, dims, features, packed)
    except ValueError as error:
        raise RuntimeError(str(error)) from None


def pack(config: StackConfig, weights: list[Any]) -> Any:
    """The weights packed for :func:`forward`; None if the kernels do not take the weights.

    The result keeps the weights alive. Its method ``is_of`` says whether other weights, biases aside,
    are the same memory.
    """
    w_ih = weights[0]
    if not w_ih.is_cpu or w_ih.dtype not in checks.DTYPES:
        return None
    aliases = [weight.detach() for weight in weights]
    try:
        return _STACKS[config].pack(w_ih.new_zeros(1, 1, w_ih.size(-1)), aliases)
    except (TypeError, ValueError, BufferError):
        return None


def backward(
    config: StackConfig,
    inputs: Inputs,
    y: Tensor,
    saved: Tensor,
    grads: Sequence[Tensor | None],
    wanted: Sequence[bool],
    norms: tuple[Tensor | None, Tensor | None] = (None, None),
) -> list[Tensor | None] | None:
    """The gradients of the ``inputs.tensors`` that are ``wanted``; None for the other tensors.

    ``grads`` are the gradients of y, h_n, c_n and the cell states; None means zeros. ``norms`` are
    float64 ``[layers, directions, T]`` and receive the norms of dL/dh_t and dL/dc_t at every step, on
    the CPU; None is not wanted. Returns None instead of a list if no kernel can run backward: on CUDA,
    if settings changed after forward.
    """
    if y.is_cuda:
        return cuda.backward(config, inputs, y, saved, grads, wanted)
    gradients = [
        torch.empty_like(t, memory_format=torch.contiguous_format)
        if is_wanted and t is not None
        else None
        for t, is_wanted in zip(inputs.tensors, wanted, strict=True)
    ]
    grad_outputs = tuple(map(rows, grads))
    grad_inputs = (*gradients[:3], gradients[3:], *norms)
    stack, threads = _STACKS[config], torch.get_num_threads()
    try:
        stack.backward(threads, inputs, y, saved, grad_outputs, grad_inputs)
    except ValueError:  # hooks on saved tensors may return tensors that are not contiguous
        inputs = readable(inputs)
        stack.backward(threads, inputs, rows(y), saved, grad_outputs, grad_inputs)
    return gradients
