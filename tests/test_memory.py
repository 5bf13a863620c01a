"""Memory that goes from forward to backward is recycled, and never shared."""

import os

import numpy as np
import pytest
import torch

import rnnfast
from rnnfast import _C, ops

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _empty():
    _C.release_memory()
    yield
    _C.release_memory()


def memory(mib: int) -> np.ndarray:
    """Of about this size: one slot of rnn_tanh's 16 units for each row."""
    rows = mib * MIB // 64
    return np.frombuffer(_C.new_saved(ops.CELLS["rnn_tanh"], False, rows, 16), np.uint8)


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_block_is_recycled_and_a_live_one_is_not():
    first, second = memory(3), memory(3)
    assert not np.shares_memory(first, second)
    address = first.ctypes.data
    del first
    third = memory(2)
    assert third.ctypes.data == address
    assert not np.shares_memory(third, second)


def test_a_block_is_not_wasted_on_a_small_request():
    large = memory(64)
    address = large.ctypes.data
    del large
    small = memory(1)
    assert small.ctypes.data != address


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_what_is_kept_is_bounded_and_can_be_released():
    before = resident()
    blocks = [memory(96) for _ in range(5)]
    for block in blocks:
        block.fill(1)
    assert resident() - before > 450 * MIB
    del block, blocks
    assert resident() - before < 280 * MIB
    _C.release_memory()
    assert resident() - before < 30 * MIB


def test_training_steps_recycle_and_overlapping_graphs_do_not():
    module = rnnfast.LSTM(5, 64)
    x = torch.randn(30, 40, 5)
    first, _ = module(x)
    second, _ = module(x)  # while the first's graph lives
    grads = torch.autograd.grad(first.square().sum(), list(module.parameters()))
    again = torch.autograd.grad(second.square().sum(), list(module.parameters()))
    for a, b in zip(grads, again, strict=True):
        assert torch.equal(a, b)


def test_bad_sizes():
    for rows, hidden in ((-1, 4), (4, -1), (1 << 60, 1 << 20), (4, 1 << 50)):
        with pytest.raises(ValueError, match="out of range"):
            _C.new_saved(ops.CELLS["gru"], False, rows, hidden)
    with pytest.raises(MemoryError):
        _C.new_saved(ops.CELLS["gru"], False, 1 << 50, 16)
