"""Packed sequences, and padded batches with lengths: checks and conversions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from . import checks


def known_batch(packed: PackedSequence, hx: Any) -> int | None:
    """The batch size of a packed sequence; None in a graph if it is data-dependent."""
    if not checks.traced():
        return int(packed.batch_sizes[0])
    if packed.sorted_indices is not None:
        return packed.sorted_indices.size(0)
    h0 = hx[0] if isinstance(hx, tuple | list) and len(hx) > 0 else hx
    return h0.size(1) if isinstance(h0, Tensor) and h0.dim() == 3 else None


def lengths_of(input: Any, lengths: Any, batch_first: bool) -> Tensor:
    """``lengths`` as an int64 tensor ``[B]`` for a padded batch ``input``. Values are not checked.

    Raises:
        TypeError: ``input`` is not a Tensor, or ``lengths`` are not integers.
        ValueError: ``input`` is not 3-D, or ``lengths`` does not have the shape ``[B]``.
        RuntimeError: ``lengths`` are not on the CPU; torch's packing raises the same error.
    """
    if not isinstance(input, Tensor):
        raise TypeError(f"lengths needs a padded batch, a Tensor; got {type(input).__name__}")
    if input.dim() != 3:
        raise ValueError(f"lengths needs a 3-D input, got {input.dim()}-D")
    if not isinstance(lengths, Tensor):
        lengths = torch.as_tensor(lengths, device="cpu")  # not torch.set_default_device's
    if lengths.dtype != torch.int64:
        is_integer = not (
            lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool
        )
        if not is_integer and lengths.numel() > 0:  # torch makes an empty list a float tensor
            raise TypeError(f"lengths must be integers, got {lengths.dtype}")
        lengths = lengths.to(torch.int64)
    if not lengths.is_cpu:
        raise RuntimeError(
            f"lengths should be a 1D CPU int64 tensor, but got {lengths.dim()}D {lengths.device} tensor"
        )
    batch = input.size(0 if batch_first else 1)
    if lengths.dim() != 1:
        raise ValueError(f"lengths must have one dimension, got {lengths.dim()}")
    if lengths.size(0) != batch:
        raise ValueError(f"lengths has {lengths.size(0)} entries; the batch has {batch} rows")
    result: Tensor = lengths
    return result


def check_lengths(lengths: Tensor, steps: int) -> None:
    """Raise the kernels' RuntimeError if a length is negative or greater than ``steps``."""
    functorch = torch._C._functorch
    while functorch.is_gradtrackingtensor(lengths):
        lengths = functorch.get_unwrapped(lengths)
    if checks.traced() or functorch.is_functorch_wrapped_tensor(lengths):
        return  # under vmap values cannot be read
    for row, length in enumerate(lengths.tolist()):
        if not 0 <= length <= steps:
            raise RuntimeError(
                f"Length of all samples has to be between 0 and the {steps} steps of the input, "
                f"but lengths[{row}] is {length}"
            )


def by_packing(
    run: Callable[[PackedSequence, Any, PackedSequence | None], tuple[Any, ...]],
    x: Tensor,
    hx: Any,
    lengths: Tensor,
    reset: Tensor | None,
    batch_first: bool,
) -> tuple[Any, ...]:
    """Pack ``x`` and ``reset``, call ``run(packed x, hx, packed reset)``, and pad its results.

    This serves torch's own layers. ``reset`` has the shape of ``x`` without its last dimension. A
    PackedSequence cannot have rows of length 0. Such rows are packed with one step, whose results are
    replaced by zeros and initial states.
    """
    steps = x.size(1 if batch_first else 0)
    check_lengths(lengths, steps)
    empty = (lengths == 0).to(x.device)
    # A trace of torch.jit must also be right for later lengths.
    has_empty = torch._C._get_tracing_state() is not None or bool((lengths == 0).any())
    if has_empty:
        x = x.masked_fill(empty[:, None, None] if batch_first else empty[:, None], 0)
    packed = pack_padded_sequence(x, lengths.clamp(min=1), batch_first, enforce_sorted=False)
    if reset is not None:
        reset = PackedSequence(take(reset, packed, batch_first), *packed[1:])  # type: ignore[assignment]
    y, states, *cells = run(packed, hx, reset)  # type: ignore[arg-type]

    def pad(sequence: PackedSequence) -> Tensor:
        padded = pad_packed_sequence(sequence, batch_first, total_length=steps)[0]
        return padded.masked_fill(empty[:, None, None] if batch_first else empty[:, None], 0)

    def with_initial(state: Tensor, initial: Tensor | None) -> Tensor:
        zero = state.new_zeros(())
        return torch.where(empty[:, None], zero if initial is None else initial.to(state.dtype), state)

    if has_empty and isinstance(states, tuple):
        states = tuple(map(with_initial, states, (None, None) if hx is None else hx))
    elif has_empty:
        states = with_initial(states, hx)
    return pad(y), states, *(pad(every_c) for every_c in cells)


def positions(
    batch_sizes: Tensor, order: Tensor | None, rows: int, padded: Tensor, batch_first: bool
) -> Tensor:
    """For each of the ``rows`` of packed data its index in ``padded.flatten(0, 1)``."""
    # Batch sizes are on the CPU.
    step, row = (t.to(padded.device) for t in step_and_row(batch_sizes, rows))
    row = row if order is None else order.index_select(0, row)
    return row * padded.size(1) + step if batch_first else step * padded.size(1) + row


def step_and_row(batch_sizes: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """For each of the ``rows`` of packed data its step, and its index within the step."""
    first = batch_sizes.cumsum(0) - batch_sizes
    steps = torch.arange(batch_sizes.size(0), device=batch_sizes.device)
    step = steps.repeat_interleave(batch_sizes, output_size=rows)
    return step, torch.arange(rows, device=batch_sizes.device) - first[step]


def take(padded: Tensor, packed: PackedSequence, batch_first: bool) -> Tensor:
    """The values of ``padded`` at the steps of ``packed``, in its order."""
    data, sizes, order, _ = packed
    indices = positions(sizes, order, data.size(0), padded, batch_first)
    return padded.flatten(0, 1).index_select(0, indices)


def reset_rows(input: Tensor | PackedSequence, reset: Any, batch_first: bool) -> Tensor:
    """``reset`` in the layout of ``input``: for a PackedSequence one bool for each row of its data.

    Raises:
        TypeError: ``reset`` is not a tensor of bools.
        ValueError: ``reset`` is on another device than ``input``, or does not have the shape of
            ``input`` without the last dimension.
        RuntimeError: a graph, when it runs, finds that the values of ``batch_sizes`` do not fit.
    """
    flags = reset.data if isinstance(reset, PackedSequence) else reset
    if not isinstance(flags, Tensor) or flags.dtype != torch.bool:
        kind = flags.dtype if isinstance(flags, Tensor) else type(flags).__name__
        raise TypeError(f"reset must be a Tensor of torch.bool, got {kind}")
    data = input.data if isinstance(input, PackedSequence) else input
    if flags.device != data.device or flags.layout != torch.strided:
        raise ValueError(
            f"reset is {flags.layout} on {flags.device}; expected {torch.strided} on {data.device}"
        )
    if isinstance(reset, PackedSequence):
        message = "reset is a PackedSequence, but not one packed as input is"
        if not isinstance(input, PackedSequence) or reset.batch_sizes.shape != input.batch_sizes.shape:
            raise ValueError(message)
        _demand((reset.batch_sizes == input.batch_sizes).all(), message)
        return flags
    if not isinstance(input, PackedSequence):
        if flags.shape != input.shape[:-1]:
            raise ValueError(
                f"reset has shape {tuple(flags.shape)}; expected {tuple(input.shape[:-1])}, that of "
                "input without its features"
            )
        return flags
    sizes = input.batch_sizes
    steps, batch = sizes.size(0), known_batch(input, None)
    if batch is None and flags.dim() == 2:  # data-dependent: _demand compares when the graph runs
        batch = flags.size(0 if batch_first else 1)
    expected: Any = (batch, steps) if batch_first else (steps, batch)
    if flags.shape != expected:
        raise ValueError(
            f"reset has shape {tuple(flags.shape)}; expected {expected}, that of the padded input "
            "without its features"
        )
    _demand(
        sizes[0].eq(expected[0 if batch_first else 1]),
        "reset has not the number of rows that batch_sizes begins with",
    )
    return take(flags, input, batch_first)


def _demand(condition: Tensor, message: str) -> None:
    if checks.traced():
        torch._assert_async(condition, message)
    elif not condition:
        raise ValueError(message)
