"""A stack of layers on torch tensors, as the kernels compute it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks, cuda
from ._native import _C
from .checks import PLAIN_TYPES
from .spec import CELLS, Outputs, Spec, spec

__all__ = [
    "CELLS",
    "Outputs",
    "Spec",
    "backward",
    "call_module",
    "forward",
    "pack",
    "rows",
    "saved_bytes_of_a_row",
    "spec",
    "takes",
    "why_not",
]


class _Stacks(dict[Spec, Any]):
    """The extension's own description of each stack, made when it is first asked for."""

    def __missing__(self, spec: Spec) -> Any:
        cell, layers, directions, *rest = spec
        stack = self[spec] = _C.Stack(CELLS[cell].number, layers, directions, False, False, *rest)
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


def saved_bytes_of_a_row(spec: Spec, x: Tensor, hidden: int, outputs: int) -> int:
    """The size of ``Outputs.saved`` for each row of ``x``."""
    if x.is_cuda:
        return cuda.saved_bytes_of_a_row(spec, x.dtype, hidden)
    memory = _STACKS[spec].new_saved(checks.DTYPES[x.dtype], 1, hidden, outputs)
    return memoryview(memory).nbytes


def forward(
    spec: Spec,
    sizes: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Any],
    save: bool,
    reset: Tensor | None = None,
    cells: bool = False,
    packed: Any = None,
) -> Outputs | None:
    """Run a stack; None, having done nothing, where an argument is not what the kernels take.

    ``x`` is ``[T, B, I]``, ``[B, T, I]`` where ``spec.batch_first``, packed ``[rows, I]``, or
    ``[B, I]`` for one step of one layer, whose states are ``[B, H]``. ``sizes``, int64 on the CPU, are
    torch's ``batch_sizes`` of a packed ``x``, or the length of each row ``[B]`` of a padded one; None
    means that every row has every step. Past a row's length nothing is read, and outputs are zero.
    ``save`` asks for what backward needs. ``packed`` is None or from :func:`pack`, with the same
    weights. Where ``reset``, bools for the rows of ``x``, is true, a row's states are zero before that
    step. ``cells`` asks for the last layer's c after every step, ``[T, B, D * H]`` or as ``y`` is.
    """
    try:
        stack = _STACKS[spec]
    except KeyError:  # no such cell
        return None
    threads, new_saved = torch.get_num_threads(), _as_tensor if save else None
    try:
        found = stack.call(
            PLAIN_TYPES, threads, sizes, reset, x, h0, c0, weights, cells, new_saved, packed
        )
    except ValueError as error:  # weights of another shape: torch raises RuntimeError
        raise RuntimeError(str(error)) from None
    if found is not None:
        return tuple.__new__(Outputs, found)
    if x.is_cuda:
        return cuda.forward(spec, sizes, x, h0, c0, weights, save, reset, cells)
    return None


def takes(spec: Spec, x: Tensor, hidden: int) -> bool:
    """Whether kernels can be expected to take such a layer: on the CPU every one."""
    return not x.is_cuda or cuda.takes(spec, x, hidden)


def why_not(
    spec: Spec,
    sizes: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Any],
    reset: Tensor | None,
) -> str:
    """What is wrong with the arguments for which :func:`forward` returned None."""
    if x.is_cuda:
        return f"on {x.device} no tier has a plan for them, or they differ in device or dtype"
    given = (torch.get_num_threads(), sizes, reset, x, h0, c0, weights)
    try:
        # One output, and of no size, so that it computes nothing if they are right.
        _STACKS[spec].forward(*given, x.new_empty(0), None, None, None, None)
    except Exception as error:
        return str(error)
    raise AssertionError("it took an output of no size")


def call_module(
    spec: Spec,
    sizes: Tensor | None,
    x: Any,
    dims: int,
    features: Any,
    hx: Any,
    parameters: dict[str, Any],
    names: Sequence[str],
    reset: Any,
    cells: bool,
    packed: Any,
) -> Any:
    """:func:`forward` without gradients for a module, from its states ``hx`` to what it returns.

    None also where a parameter is missing, or ``x`` has not ``dims`` dimensions and so many
    ``features``.
    """
    try:
        stack = _STACKS[spec]
    except KeyError:
        return None
    threads = torch.get_num_threads()
    try:
        return stack.call_module(
            PLAIN_TYPES, threads, sizes, x, dims, features, hx, parameters, names, reset, cells, packed
        )
    except ValueError as error:
        raise RuntimeError(str(error)) from None


def pack(spec: Spec, weights: list[Any]) -> Any:
    """The weights packed for :func:`forward`, or None where they are not what the kernels take.

    It keeps them, and its method ``is_of`` tells whether others, biases aside, lie in the same memory.
    """
    w_ih = weights[0]
    if not w_ih.is_cpu or w_ih.dtype not in checks.DTYPES:
        return None
    aliases = [weight.detach() for weight in weights]
    try:
        return _STACKS[spec].pack(w_ih.new_zeros(1, 1, w_ih.size(-1)), aliases)
    except (TypeError, ValueError, BufferError):
        return None


def backward(
    spec: Spec,
    sizes: Tensor | None,
    reset: Tensor | None,
    inputs: tuple[Tensor | None, ...],
    y: Tensor,
    saved: Tensor,
    grads: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None] | None:
    """The gradients of those ``inputs``, ``(x, h0, c0, *weights)``, that are ``wanted``; others None.

    ``grads`` are those of y, h_n, c_n and cells; None means zeros. None in the place of all: no kernel
    can go back where one went forward, on a CUDA device whose settings have changed.
    """
    if y.is_cuda:
        return cuda.backward(spec, sizes, reset, inputs, y, saved, grads, wanted)
    found = [
        torch.empty_like(t, memory_format=torch.contiguous_format) if wants and t is not None else None
        for t, wants in zip(inputs, wanted, strict=True)
    ]
    given = tuple(map(rows, grads))
    stack, threads = _STACKS[spec], torch.get_num_threads()
    written = (*found[:3], found[3:])

    def run(y: Any, x: Any, h0: Any, c0: Any, *weights: Any) -> None:
        stack.backward(*(threads, sizes, reset, x, h0, c0, list(weights), y, saved, *given, *written))

    try:
        run(y, *inputs)
    except ValueError:  # a hook on saved tensors may have returned others, not contiguous
        run(*map(rows, (y, *inputs)))
    return found
