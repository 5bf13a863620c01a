"""Packed sequences, and padded batches with lengths: what is said of their rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from . import checks


def known_batch(packed: PackedSequence, hx: Any) -> int | None:
    """How many rows there are; None in a graph where nothing but the data says it."""
    if not checks.traced():
        return int(packed.batch_sizes[0])
    if packed.sorted_indices is not None:
        return packed.sorted_indices.size(0)
    h0 = hx[0] if isinstance(hx, tuple | list) and len(hx) > 0 else hx
    return h0.size(1) if isinstance(h0, Tensor) and h0.dim() == 3 else None


def lengths_of(input: Any, lengths: Any, batch_first: bool) -> Tensor:
    """``lengths`` as int64, one for each row of a padded batch ``input``; their values are not read.

    Raises:
        TypeError: ``input`` is no Tensor; lengths are no integers.
        ValueError: ``input`` is not 3-D; there are not as many lengths as rows.
        RuntimeError: lengths are on another device than the CPU, as torch's packing says it.
    """
    if not isinstance(input, Tensor):
        raise TypeError(f"lengths needs a padded batch, a Tensor; got {type(input).__name__}")
    if input.dim() != 3:
        raise ValueError(f"lengths needs a 3-D input, got {input.dim()}-D")
    if not isinstance(lengths, Tensor):
        lengths = torch.as_tensor(lengths, device="cpu")  # whatever torch.set_default_device says
    if lengths.dtype != torch.int64:
        wrong = lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool
        if wrong and lengths.numel() > 0:  # of an empty list torch makes floats
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
    """Raise the RuntimeError of the kernels where a length is negative, or beyond the input's steps."""
    functorch = torch._C._functorch
    while functorch.is_gradtrackingtensor(lengths):
        lengths = functorch.get_unwrapped(lengths)
    if checks.traced() or functorch.is_functorch_wrapped_tensor(lengths):
        return  # values that differ along vmap, which nobody can read
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
    """What ``run(packed x, hx, packed reset)`` gives, padded again: for torch's own layers.

    ``reset`` has the shape of ``x`` without its features. No PackedSequence has rows of length 0: they
    are packed with one step, and what that gives is left out.
    """
    steps = x.size(1 if batch_first else 0)
    check_lengths(lengths, steps)
    empty = (lengths == 0).to(x.device)
    has_empty = bool((lengths == 0).any())
    if has_empty:
        x = x.masked_fill(empty[:, None, None] if batch_first else empty[:, None], 0)
    packed = pack_padded_sequence(x, lengths.clamp(min=1), batch_first, enforce_sorted=False)
    if reset is not None:
        reset = PackedSequence(take(reset, packed, batch_first), *packed[1:])  # type: ignore[assignment]
    y, final, *cells = run(packed, hx, reset)  # type: ignore[arg-type]

    def pad(of: PackedSequence) -> Tensor:
        padded = pad_packed_sequence(of, batch_first, total_length=steps)[0]
        return padded.masked_fill(empty[:, None, None] if batch_first else empty[:, None], 0)

    def kept(new: Tensor, initial: Tensor | None) -> Tensor:
        zero = new.new_zeros(())
        return torch.where(empty[:, None], zero if initial is None else initial.to(new.dtype), new)

    if has_empty and isinstance(final, tuple):
        final = tuple(map(kept, final, (None, None) if hx is None else hx))
    elif has_empty:
        final = kept(final, hx)
    return pad(y), final, *(pad(every_c) for every_c in cells)


def positions(
    batch_sizes: Tensor, order: Tensor | None, rows: int, padded: Tensor, batch_first: bool
) -> Tensor:
    """Where each of the ``rows`` of packed data lies in ``padded.flatten(0, 1)``."""
    step, row = step_and_row(batch_sizes, rows)
    row = row if order is None else order[row]
    return row * padded.size(1) + step if batch_first else step * padded.size(1) + row


def step_and_row(batch_sizes: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Of each of the ``rows`` of packed data its step, and its place among those of that step."""
    first = batch_sizes.cumsum(0) - batch_sizes
    count = torch.arange(batch_sizes.size(0), device=batch_sizes.device)
    step = count.repeat_interleave(batch_sizes, output_size=rows)
    return step, torch.arange(rows, device=batch_sizes.device) - first[step]


def take(padded: Tensor, packed: PackedSequence, batch_first: bool) -> Tensor:
    """The rows of ``padded`` that ``packed`` has, in its order."""
    data, sizes, order, _ = packed
    where = positions(sizes, order, data.size(0), padded, batch_first)
    return padded.flatten(0, 1).index_select(0, where)


def reset_rows(input: Tensor | PackedSequence, reset: Any, batch_first: bool) -> Tensor:
    """``reset`` with one bool for every row of ``input``: that of a PackedSequence's data.

    Raises:
        TypeError: it is no tensor of bools.
        ValueError: it lies elsewhere than ``input``, or has not its shape without the features; a
            RuntimeError where a graph finds that out when it runs, from ``batch_sizes``.
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
        wrong = "reset is a PackedSequence, but not one packed as input is"
        if not isinstance(input, PackedSequence) or reset.batch_sizes.shape != input.batch_sizes.shape:
            raise ValueError(wrong)
        _demand((reset.batch_sizes == input.batch_sizes).all(), wrong)
        return given
    if not isinstance(input, PackedSequence):
        if given.shape != input.shape[:-1]:
            raise ValueError(
                f"reset has shape {tuple(given.shape)}; expected {tuple(input.shape[:-1])}, that of "
                "input without its features"
            )
        return given
    sizes = input.batch_sizes
    steps, batch = sizes.size(0), known_batch(input, None)
    if batch is None and given.dim() == 2:  # data, to be compared when it runs
        batch = given.size(0 if batch_first else 1)
    expected: Any = (batch, steps) if batch_first else (steps, batch)
    if given.shape != expected:
        raise ValueError(
            f"reset has shape {tuple(given.shape)}; expected {expected}, that of the padded input "
            "without its features"
        )
    _demand(
        sizes[0].eq(expected[0 if batch_first else 1]),
        "reset has not the number of rows that batch_sizes begins with",
    )
    return take(given, input, batch_first)


def _demand(holds: Tensor, message: str) -> None:
    if checks.traced():
        torch._assert_async(holds, message)
    elif not holds:
        raise ValueError(message)
