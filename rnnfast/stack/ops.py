"""A stack of layers on torch tensors, as the kernels compute it."""

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
    "rows",
    "saved_bytes_of_a_row",
    "takes",
    "why_not",
]


class _Stacks(dict[StackConfig, Any]):
    """The extension's own description of each stack, made when it is first asked for."""

    def __missing__(self, config: StackConfig) -> Any:
        fields = config._asdict() | {"cell": CELLS[config.cell].number}
        stack = self[config] = _C.Stack(**fields)
        return stack


_STACKS = _Stacks()


def rows(t: Tensor | None) -> Tensor | None:
    """A tensor that the kernels can read: its last dimension contiguous. Copies only if it must."""
    if t is None or checks.traced():  # the operator looks again
        return t
    return checks.readable(t)


def _as_tensor(memory: Any) -> Tensor:
    if memoryview(memory).nbytes == 0:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    return torch.frombuffer(memory, dtype=torch.uint8)


def saved_bytes_of_a_row(config: StackConfig, x: Tensor, hidden: int, outputs: int) -> int:
    """The size of ``Outputs.saved`` for each row of ``x``."""
    if x.is_cuda:
        return cuda.saved_bytes_of_a_row(config, x.dtype, hidden)
    memory = _STACKS[config].new_saved(checks.DTYPES[x.dtype], 1, hidden, outputs)
    return memoryview(memory).nbytes


def forward(
    config: StackConfig, inputs: Inputs, save: bool = False, packed: Any = None
) -> Outputs | None:
    """Run a stack; None, having done nothing, where the kernels do not take the inputs.

    Steps past a row's length are neither read nor computed, and their outputs are zero.

    Args:
        config: the stack.
        inputs: as :class:`Inputs` describes them; ``weights`` a list.
        save: whether :func:`backward` will follow.
        packed: None, or what :func:`pack` made of the same weights.

    """
    try:
        stack = _STACKS[config]
    except KeyError:  # no such cell
        return None
    threads, new_saved = torch.get_num_threads(), _as_tensor if save else None
    try:
        found = stack.call(PLAIN_TYPES, threads, inputs, new_saved, packed)
    except ValueError as error:  # weights of another shape: torch raises RuntimeError
        raise RuntimeError(str(error)) from None
    if found is not None:
        return tuple.__new__(Outputs, found)
    if inputs.x.is_cuda:
        return cuda.forward(config, inputs, save)
    return None


def takes(config: StackConfig, x: Tensor, hidden: int) -> bool:
    """Whether kernels can be expected to take such a layer: on the CPU every one."""
    return not x.is_cuda or cuda.takes(config, x, hidden)


def why_not(config: StackConfig, inputs: Inputs) -> str:
    """What is wrong with the inputs for which :func:`forward` returned None."""
    x = inputs.x
    if x.is_cuda:
        return f"on {x.device} no tier has a plan for them, or they differ in device or dtype"
    # One output, and of no size, so that it computes nothing if they are right.
    outputs = (x.new_empty(0), None, None, None, None)
    try:
        _STACKS[config].forward(torch.get_num_threads(), inputs, outputs)
    except Exception as error:
        return str(error)
    raise AssertionError("it took an output of no size")


def call_module(
    config: StackConfig,
    inputs: tuple[Any, Any, dict[str, Any], Sequence[str], Any, Any],
    dims: int,
    features: Any,
    packed: Any,
) -> Any:
    """:func:`forward` without gradients for a module; returns what the module returns.

    ``inputs`` are :class:`Inputs` as a module has them: ``(x, hx, parameters, names, sizes, reset)``.
    None also where a parameter is missing, or ``x`` has not ``dims`` dimensions and so many
    ``features``.
    """
    try:
        stack = _STACKS[config]
    except KeyError:
        return None
    threads = torch.get_num_threads()
    try:
        return stack.call_module(PLAIN_TYPES, threads, inputs, dims, features, packed)
    except ValueError as error:
        raise RuntimeError(str(error)) from None


def pack(config: StackConfig, weights: list[Any]) -> Any:
    """The weights packed for :func:`forward`, or None where they are not what the kernels take.

    It keeps them, and its method ``is_of`` tells whether others, biases aside, lie in the same memory.
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
) -> list[Tensor | None] | None:
    """The gradients of those ``inputs.tensors`` that are ``wanted``; None for the others.

    ``grads`` are those of y, h_n, c_n and the cell states; None means zeros. None in the place of all:
    no kernel can go back where one went forward, on a CUDA device whose settings have changed.
    """
    if y.is_cuda:
        return cuda.backward(config, inputs, y, saved, grads, wanted)
    found = [
        torch.empty_like(t, memory_format=torch.contiguous_format) if wants and t is not None else None
        for t, wants in zip(inputs.tensors, wanted, strict=True)
    ]
    given = tuple(map(rows, grads))
    written = (*found[:3], found[3:])
    stack, threads = _STACKS[config], torch.get_num_threads()
    try:
        stack.backward(threads, inputs, y, saved, given, written)
    except ValueError:  # a hook on saved tensors may have returned others, not contiguous
        inputs = inputs.with_tensors(map(rows, inputs.tensors))
        stack.backward(threads, inputs, rows(y), saved, given, written)
    return found
