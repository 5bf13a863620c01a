"""Float32 on a matrix unit: products of numbers that are split into bfloat16 parts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import rnnfast
import tolerances
from reference import CELLS
from rnnfast import _C
from seeds import seed
from threads import set_threads
from twins import flatten, make, states

UNITS = [isa for isa in ("amx_emulated", "amx") if isa in _C.supported_isas()]

pytestmark = pytest.mark.skipif(not UNITS, reason="no matrix unit was built for this processor")
every_unit = pytest.mark.parametrize("isa", UNITS)
every_cell = pytest.mark.parametrize("cell", CELLS)
every_number = pytest.mark.parametrize("parts", [1, 2, 3])


@pytest.fixture(autouse=True)
def highest():
    _C.force_float32_parts(-1)
    yield
    torch.set_float32_matmul_precision("highest")


def sums(x, w):
    """The product of x [B, K] and the transposed w [H, K], where it is positive."""
    module = make(rnnfast, "rnn_relu", x.size(1), len(w), bias=False)
    with torch.no_grad():
        module.weight_ih_l0.copy_(w)
        module.weight_hh_l0.zero_()
        return module(x[None])[0][0]


@every_unit
@every_number
@pytest.mark.parametrize("width", [64, 250, 512, 1024])
def test_errors_of_sums(isa, parts, width):
    x, w = torch.randn(200, width), torch.randn(64, width) / width**0.5
    want = (x.double() @ w.double().T).relu().numpy()

    def error():
        got = sums(x, w).numpy()
        return tolerances.rms(got[want > 0], want[want > 0])

    _C.force_float32_parts(0)
    of_multiply_adds = error()
    _C.force_float32_parts(parts)
    assert tolerances.IN_PARTS[parts] / 3 < error() < tolerances.IN_PARTS[parts]
    if parts == 3:
        assert error() < 0.6 * of_multiply_adds


@every_unit
@every_number
def test_infinities_and_large_numbers(isa, parts):
    """They give what float32 gives: no number becomes infinite, and no infinity becomes NaN."""
    largest = float(np.finfo(np.float32).max)
    values = [torch.inf, -torch.inf, torch.nan, largest, -largest, 3.395e38, 1e-37, 0.0]
    x = torch.zeros(len(values), 40)
    for row, value in enumerate(values):
        x[row, 3 * row] = value
    x[:, 39] = 0.5
    w = torch.randn(20, 40)
    w[:, 1] = 0
    _C.force_float32_parts(0)
    want = sums(x, w)
    _C.force_float32_parts(parts)
    got = sums(x, w)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isinf(), want.isinf())
    finite = want.isfinite()
    torch.testing.assert_close(
        got[finite], want[finite], rtol=2.0 ** (2 - 8 * parts), atol=1e-6 if parts > 1 else 1e-2
    )


@every_unit
@every_cell
@every_number
def test_threads_and_batches_do_not_matter(cell, parts, isa):
    _C.force_float32_parts(parts)
    module = make(rnnfast, cell, 21, 70, num_layers=2, bidirectional=True)
    x, hx = torch.randn(7, 35, 21), states(cell, 4, 35, 70)
    results = []
    for threads, partition in ((1, "chosen"), (3, "rows"), (3, "units")):
        set_threads(threads)
        _C.force_partition(partition, oversubscribe=True)
        out = flatten(module(x, hx))
        seed(1)
        grads = torch.autograd.grad(out, list(module.parameters()), [torch.randn_like(o) for o in out])
        results.append([*out, *grads])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    row = tuple(h[:, 20:21].contiguous() for h in flatten(hx))
    alone = module(x[:, 20:21], row if CELLS[cell].has_c else row[0])[0]
    assert torch.equal(alone, results[0][0][:, 20:21])


SETTINGS = {"highest": 0, "high": 2, "medium": 1}


@every_unit
@pytest.mark.parametrize("suffix", ["", "Cell"])
def test_the_setting_of_torch_decides(isa, suffix):
    """At each call, also for frozen weights, in a graph, and backward as forward."""
    module = make(rnnfast, "lstm", 40, 50, suffix=suffix)
    x = torch.randn(*(() if suffix else (5,)), 3, 40)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")

    def gradients(run):
        out = flatten(run(x))
        return [*out, *torch.autograd.grad(out[0].square().sum(), list(module.parameters()))]

    different = []
    with rnnfast.frozen(module):
        for setting in (*SETTINGS, "high", "highest"):
            torch.set_float32_matmul_precision(setting)
            got = [*gradients(module), *gradients(compiled)]
            with torch.no_grad():
                got += flatten(module(x))
            _C.force_float32_parts(SETTINGS[setting])
            want = gradients(module)
            _C.force_float32_parts(-1)
            assert all(torch.equal(a, b) for a, b in zip(got, want * 2 + want, strict=False))
            different.append(want[0])
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert not torch.equal(different[a], different[b])


@pytest.mark.parametrize("isa", sorted({*_C.supported_isas()} - {*UNITS}))
def test_other_instruction_sets_compute_as_ever(isa):
    """A lower precision would make nothing faster there."""
    module, x = make(rnnfast, "gru", 40, 50), torch.randn(5, 3, 40)
    want = module(x)[0]
    for setting in SETTINGS:
        torch.set_float32_matmul_precision(setting)
        assert torch.equal(module(x)[0], want)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"precision is 3; expected 0"):
        _C.Stack(cell=0, precision=3)
    with pytest.raises(ValueError, match="parts is 4; expected at most 3"):
        _C.force_float32_parts(4)
