"""Memory that goes from forward to backward is recycled, and never shared."""

import os
import sys
import threading
import time
from functools import partial

import numpy as np
import pytest
import torch

import reference
import rnnfast
from peak_memory import peak
from problems import Problem, forward_arrays
from rnnfast import _C
from rnnfast.stack import ops
from rnnfast.stack.config import CELLS, Inputs, StackConfig

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _empty():
    _C.release_memory()
    yield
    _C.release_memory()


def stack(cell: str) -> _C.Stack:
    return _C.Stack(cell=CELLS[cell].number, single=True)


def memory(mib: int) -> np.ndarray:
    """Of about this size: one slot of rnn_tanh's 16 units for each row."""
    rows = mib * MIB // 64
    return np.frombuffer(stack("rnn_tanh").new_saved("float32", rows, 16, 16), np.uint8)


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


@pytest.mark.numerics(dtype="bfloat16")
@pytest.mark.parametrize("cell", CELLS)
def test_an_empty_batch_has_gradients_of_zero_whatever_the_memory_held(cell):
    check_an_empty_batch(cell, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cell", CELLS)
def test_an_empty_batch_of_wide_numbers(cell, dtype):
    check_an_empty_batch(cell, dtype)


def check_an_empty_batch(cell, dtype):
    reference_cell = reference.CELLS[cell]
    make = partial(getattr(rnnfast, reference_cell.layer), **dict(reference_cell.options), dtype=dtype)
    larger = make(64, 64)  # its numbers stay in the kept memory
    larger(torch.randn(5, 8, 64, dtype=dtype))[0].sum().backward()
    empty = make(4, 5)
    empty(torch.randn(3, 0, 4, dtype=dtype))[0].sum().backward()
    for name, weight in empty.named_parameters():
        assert weight.grad.count_nonzero() == 0, name


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


def let_others_run(act) -> bool:
    """Whether a thread that looks at the clock did so while `act` ran: only without the GIL it can."""
    seen, stop, interval = [], threading.Event(), sys.getswitchinterval()

    def look():
        while not stop.is_set():
            seen.append(time.perf_counter())
            time.sleep(1e-4)

    thread = threading.Thread(target=look)
    sys.setswitchinterval(1000)  # none gives the GIL up because another waits
    try:
        thread.start()
        while not seen:
            time.sleep(1e-4)
        begin = time.perf_counter()
        act()
        end = time.perf_counter()
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        thread.join()
    return any(begin < moment < end for moment in seen)


def written(mib: int) -> np.ndarray:
    block = memory(mib)
    block.fill(1)  # pages that were never written are freed in no time
    return block


def test_others_run_while_a_large_block_is_freed():
    def frees() -> bool:
        held = [written(300)]  # more than is kept
        return let_others_run(held.clear)

    assert any(frees() for _ in range(10))  # a busy machine may let the other thread wait


def test_others_run_while_a_large_block_is_taken():
    """Blocks that are too small are freed first."""

    def takes() -> bool:
        _C.release_memory()
        written(200)
        return let_others_run(lambda: memory(210))

    assert any(takes() for _ in range(10))


@pytest.mark.parametrize("backward", [False, True])
def test_others_run_while_kernels_do(backward):
    problem = Problem("lstm", 60, 32, 128, 128)
    result = forward_arrays("lstm", **problem.inputs(), save=True, threads=1)
    arrays, cotangents = problem.inputs(), problem.cotangents()

    def runs():
        if backward:
            result.backward(**cotangents)
        else:
            forward_arrays("lstm", **arrays, threads=1)

    assert any(let_others_run(runs) for _ in range(10))


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
            stack("gru").new_saved("float32", rows, hidden, hidden)
    with pytest.raises(RuntimeError, match="rnnfast tried to allocate"):
        stack("gru").new_saved("float32", 1 << 50, 16, 16)


def test_out_of_memory_is_the_error_that_torch_raises():
    """A petabyte for backward, of an output of a gigabyte that is never touched."""
    from lightning.pytorch.utilities.memory import is_oom_error

    units, steps = 1 << 20, 1 << 28
    config = StackConfig("lstm", bias=False, projected=True)
    x = torch.zeros(1, 1, 1).expand(steps, 1, 1)
    weights = [torch.zeros(4 * units, 1), torch.zeros(4 * units, 1), torch.zeros(1, units)]
    with pytest.raises(RuntimeError, match="rnnfast tried to allocate") as caught:
        ops.forward(config, Inputs(x, None, None, weights), save=True)
    assert is_oom_error(caught.value)  # Lightning then tries a smaller batch


LITTLE_MEMORY = """
import resource
import torch, rnnfast
torch.set_num_threads(1)  # the stacks of more threads count too
module = rnnfast.GRU(1, 256, 2)
x = torch.zeros(1000, 200, 1)
with torch.no_grad():
    module(x[:1, :1])
    pages = int(open("/proc/self/statm").read().split()[0])
    limit = pages * resource.getpagesize() + 320 * 2**20  # of outputs of 205 MB each
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        module(x)
    except RuntimeError as error:
        print(error)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_out_of_memory_between_two_layers(python):
    assert "DefaultCPUAllocator: can't allocate memory: rnnfast tried" in python(LITTLE_MEMORY).stdout


KEPT_MEMORY = """
import resource
import torch
from rnnfast import _C
stack = _C.Stack(cell=0, single=True)
stack.new_saved("float32", 200 << 14, 16, 16)  # 200 MiB, which are kept
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (20 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
stack.new_saved("float32", 50 << 14, 16, 16)  # too few bytes to waste the kept ones on
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_what_is_kept_is_given_up_before_memory_runs_out(python):
    python(KEPT_MEMORY)


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs /proc")
@pytest.mark.parametrize(
    "case",
    [("LSTM", 60, 128, 256), ("GRU", 60, 128, 256), ("LSTM", 20, 16, 768), ("RNN", 200, 64, 128)],
)
def test_a_training_step_needs_no_more_than_torch(case):
    # 2 MiB for what allocators round up.
    assert peak("rnnfast", *case) <= peak("torch", *case) + 2048
