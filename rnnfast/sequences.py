"""Packed sequences: made of a padded batch and back, in a graph too, and what is said of their rows.

Eager calls use torch's own functions. A graph cannot hold those, so there it is done by index.
"""

from __future__ import annotations

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


def pack(x: Tensor, lengths: Tensor, batch_first: bool) -> PackedSequence:
    """``pack_padded_sequence`` of rows in any order, each of which has a length within ``x``.

    Raises:
        RuntimeError: what torch refuses. In a graph, which raises when it runs, a length that is not
            positive or beyond the steps of ``x``.
        ValueError: a length is beyond the steps of ``x``; there are not as many as rows.
    """
    batch, steps = x.shape[:2] if batch_first else (x.size(1), x.size(0))
    if checks.traced():
        _one_for_each_row(lengths, batch)
        return _pack_by_index(x, lengths, steps, batch_first)
    packed = pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False)
    _one_for_each_row(lengths, batch)  # torch drops the rows that have none
    if packed.batch_sizes.numel() > steps:
        raise ValueError(f"lengths reach {packed.batch_sizes.numel()}; the input has {steps} steps")
    return packed


def _one_for_each_row(lengths: Tensor, batch: int) -> None:
    if lengths.dim() != 1:
        raise ValueError(f"lengths must have one dimension, got {lengths.dim()}")
    if lengths.size(0) != batch:
        raise ValueError(f"lengths has {lengths.size(0)} entries; the batch has {batch} rows")


def _pack_by_index(x: Tensor, lengths: Tensor, steps: int, batch_first: bool) -> PackedSequence:
    ordered, order = torch.sort(lengths.to(torch.int64), descending=True)
    torch._assert_async(ordered[-1] > 0, "lengths must be greater than 0")
    torch._assert_async(ordered[0] <= steps, "lengths reach beyond the steps of the input")
    longest: Any = ordered[0].item()
    rows: Any = ordered.sum().item()
    # What narrow needs to know of a size that is data.
    torch._check(longest >= 1)  # type: ignore[no-untyped-call]
    torch._check(longest <= steps)  # type: ignore[no-untyped-call]
    sizes = (ordered > torch.arange(steps, device=lengths.device)[:, None]).sum(1)
    sizes = sizes.narrow(0, 0, longest)
    where = positions(sizes, order, rows, x, batch_first)
    return PackedSequence(x.flatten(0, 1).index_select(0, where), sizes, order)


def pad(packed: PackedSequence, like: Tensor, batch_first: bool) -> Tensor:
    """``pad_packed_sequence``, with the batch and the steps of ``like``."""
    if not checks.traced():
        total = like.size(1 if batch_first else 0)
        return pad_packed_sequence(packed, batch_first, total_length=total)[0]
    data, sizes, order, _ = packed
    where = positions(sizes, order, data.size(0), like, batch_first)
    padded = data.new_zeros(like.size(0) * like.size(1), data.size(1)).index_copy(0, where, data)
    return padded.view(like.size(0), like.size(1), -1)


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
