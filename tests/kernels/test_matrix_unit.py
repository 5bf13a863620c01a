"""Products of bfloat16 on a matrix unit, the processor's and the emulated one."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

import rnnfast
from peak_memory import peak
from reference import CELLS
from rnnfast import _C
from threads import set_threads
from twins import flatten, make, states

UNITS = [isa for isa in ("amx_emulated", "amx") if isa in _C.supported_isas()]
BF16 = torch.bfloat16

pytestmark = pytest.mark.skipif(not UNITS, reason="no matrix unit was built for this processor")
every_unit = pytest.mark.parametrize("isa", UNITS)
SHAPES = [(1, 1, 3, 5), (7, 3, 33, 65), (9, 40, 70, 48), (40, 20, 128, 256)]  # T, B, I, H
every_cell = pytest.mark.parametrize("cell", CELLS)


def sums_of_tiles(a, b):
    """A [M, K] times b [N, K] as Intel's manual defines TDPBF16PS, in float32.

    The sums of even and of odd k of a group of 32 run apart. Every product of two bfloat16 and its
    sum with a float32 fit a long double, so that each step rounds once.
    """
    groups = -(-a.shape[1] // 32)
    a, b = (np.pad(m, ((0, 0), (0, groups * 32 - m.shape[1]))).astype(np.longdouble) for m in (a, b))
    total = np.zeros((len(a), len(b)), np.float32)
    for begin in range(0, groups * 32, 32):
        parts = []
        for first in (begin, begin + 1):
            part = np.zeros_like(total)
            for k in range(first, begin + 32, 2):
                part = (part + a[:, k, None] * b[None, :, k]).astype(np.float32)
            parts.append(part)
        total = total + (parts[0] + parts[1])
    return total


@every_unit
@pytest.mark.parametrize("width", [3, 32, 70, 200, 512])
@pytest.mark.parametrize("batch", [1, 5, 16, 40])
def test_the_sums_are_those_of_the_instruction(isa, width, batch):
    """Of terms that cancel, so that what is left are the roundings of the sums."""
    module = make(rnnfast, "rnn_relu", width, 20, bias=False, dtype=BF16)
    half = torch.randn(batch, width // 2, dtype=BF16)
    order = torch.randperm(width // 2)
    x = torch.cat([half, -half[:, order], torch.zeros(batch, width % 2, dtype=BF16)], 1)
    with torch.no_grad():
        module.weight_hh_l0.zero_()
        w = module.weight_ih_l0
        w[:, width // 2 : width // 2 * 2] = w[:, : width // 2][:, order]
        y = module(x[None])[0][0]
    want = np.maximum(sums_of_tiles(x.float().numpy(), module.weight_ih_l0.detach().float().numpy()), 0)
    assert torch.equal(y, torch.from_numpy(want).to(BF16))
    if width > 32 and batch > 1:
        assert 0 < y.max() < 1e-3
        assert len(y.unique()) > 1


def solve(cell, shape, isa, **options):
    """Outputs, and the gradients of inputs, states and weights."""
    _C.force_isa(isa)
    steps, batch, inputs, hidden = shape
    module = make(rnnfast, cell, inputs, hidden, dtype=BF16, **options)
    count = module.num_layers * (2 if module.bidirectional else 1)
    x = torch.randn(steps, batch, inputs, dtype=BF16).requires_grad_()
    hx = states(cell, count, batch, hidden, dtype=BF16)
    leaves = [x, *(h.requires_grad_() for h in flatten(hx)), *module.parameters()]
    out = flatten(module(x, hx))
    cotangents = [torch.randn_like(o) for o in out]
    return [*out, *torch.autograd.grad(out, leaves, cotangents)]


@pytest.mark.skipif(len(UNITS) < 2, reason="this processor has no matrix unit")
@every_cell
@pytest.mark.parametrize(
    "shape", [(1, 1, 3, 5), (7, 3, 33, 65), (9, 40, 70, 48), (40, 20, 128, 256)], ids=str
)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=["", "stack"])
def test_the_emulation_has_the_bits_of_the_unit(cell, shape, options):
    emulated, real = (solve(cell, shape, isa, **options) for isa in UNITS)
    assert all(torch.equal(a, b) for a, b in zip(emulated, real, strict=True))


@every_unit
@every_cell
def test_a_row_has_the_same_bits_alone_and_among_others(cell, isa):
    """Tiles of 16 rows are full, or have one row."""
    steps, batch, inputs, hidden = 6, 37, 21, 40
    module = make(rnnfast, cell, inputs, hidden, dtype=BF16)
    x, hx = torch.randn(steps, batch, inputs, dtype=BF16), states(cell, 1, batch, hidden, dtype=BF16)
    with torch.no_grad():
        all_rows = flatten(module(x, hx))
        for row in (0, 15, 16, 36):
            part = tuple(h[:, row : row + 1] for h in flatten(hx))
            alone = flatten(module(x[:, row : row + 1], part if CELLS[cell].has_c else part[0]))
            for a, b in zip(alone, all_rows, strict=True):
                assert torch.equal(a, b[:, row : row + 1])
        if CELLS[cell].has_c:
            return  # from call to call c is rounded to bfloat16
        state, y = hx, []
        for t in range(steps):
            out, state = module(x[t : t + 1], state)
            y.append(out)
        assert torch.equal(torch.cat(y), all_rows[0])


@every_unit
@pytest.mark.parametrize("partition", ["rows", "units"])
@every_cell
def test_threads_do_not_matter(cell, partition, isa):
    for options in ({}, {"num_layers": 2, "bidirectional": True}):
        set_threads(1)
        want = solve(cell, (7, 35, 21, 70), isa, **options)
        set_threads(3)
        _C.force_partition(partition, oversubscribe=True)
        got = solve(cell, (7, 35, 21, 70), isa, **options)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@every_unit
def test_infinite_inputs_stay_in_their_rows(isa):
    """What a tile reads past the hidden units, and past the rows, has no say."""
    for cell in CELLS:
        module = make(rnnfast, cell, 5, 17, dtype=BF16)
        x = torch.randn(4, 3, 5, dtype=BF16)
        want = module(x)[0]
        x[1, 1, 2] = torch.inf
        x.requires_grad_()
        y = module(x)[0]
        assert torch.equal(y[:, [0, 2]], want[:, [0, 2]])
        grad = torch.autograd.grad(y[:, [0, 2]].float().square().sum(), x)[0]
        assert grad[:, [0, 2]].isfinite().all()


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs /proc")
@every_unit
@pytest.mark.parametrize(
    ("cell", "steps", "batch", "size"), [("LSTM", 40, 32, 256), ("GRU", 20, 16, 512)]
)
def test_memory_grows_by_no_more_than_the_weights(isa, cell, steps, batch, size):
    """Against the kernels that have no matrix unit."""
    module = make(rnnfast, cell.lower(), size, size, dtype=BF16)
    weights = sum(p.numel() for p in module.parameters()) * 2 // 1024
    with_unit, without = (
        peak("rnnfast", cell, steps, batch, size, "bfloat16", i) for i in (isa, "avx2")
    )
    assert with_unit <= without + weights + 1024  # KiB: 1 MiB for what allocators round up


@every_unit
def test_an_emulation_is_never_chosen(isa, python):
    chosen = python("from rnnfast import _C; print(_C.isa())", RNNFAST_ISA="").stdout.strip()
    assert "emulated" not in chosen
    assert chosen == _C.supported_isas()[-1]
