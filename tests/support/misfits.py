"""Tensors that do not fit in the place of another."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def misfits(
    tensor: torch.Tensor, gaps: bool = True, dense: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """What is wrong with each, and the tensor.

    Without `gaps` the distance of numbers does not matter. A `dense` tensor has no gaps between rows.
    """
    for dim in range(tensor.dim()):
        for more in (1, -1):
            shape = [size + more * (n == dim) for n, size in enumerate(tensor.shape)]
            yield f"{more:+} in dimension {dim}", tensor.new_zeros(shape)
    yield "another dtype", tensor.to(torch.int32)
    yield "a dimension more", tensor[None]
    if tensor.dim() > 1:
        yield "a dimension less", tensor[0]
    if gaps:
        yield "gaps between numbers", tensor.repeat_interleave(2, -1)[..., ::2]
    if dense and tensor.dim() > 1:
        yield "gaps between rows", tensor.repeat_interleave(2, -2)[..., ::2, :]
