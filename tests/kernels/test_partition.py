"""Who computes what never changes a bit: one thread, rows, hidden units, or a wavefront over layers."""

from __future__ import annotations

import os

import pytest
import torch

import rnnfast
from rnnfast import _C

CELLS = [rnnfast.LSTM, rnnfast.GRU, rnnfast.RNN]
PROCESSORS = len(os.sched_getaffinity(0))


@pytest.fixture
def partition():
    """Forces one, among more threads than there are processors too."""

    def force(name, number):
        _C.force_partition(name, oversubscribe=True)
        torch.set_num_threads(number)

    yield force
    _C.force_partition("chosen")


def results(module, x, options):
    """Outputs of inference and training, the gradients, and the ways in which all that was computed."""
    ways = set()

    def call():
        leaves = torch.utils._pytree.tree_leaves(module(x, **options))
        ways.add(_C.used_partition())
        return [t for t in leaves if t is not None and t.is_floating_point()]

    with torch.no_grad():
        inference = call()
    training = call()
    torch.manual_seed(1)
    total = sum((t * torch.randn_like(t)).sum() for t in training)
    inputs = x.data if isinstance(x, torch.nn.utils.rnn.PackedSequence) else x
    grads = torch.autograd.grad(total, [inputs, *module.parameters()])
    ways.add(_C.used_partition())
    return [*inference, *training, *grads], ways


def same_everywhere(partition, module, x, options, names=("rows", "units", "wavefront")):
    partition("one", 1)
    expected, ways = results(module, x, options)
    assert ways == {("one", 1)}
    for name in (*names, "chosen"):
        for number in (2, 3, 5):
            partition(name, number)
            found, ways = results(module, x, options)
            for a, b in zip(found, expected, strict=True):
                assert torch.equal(a, b), (name, number)
            most = min(number, 4 * PROCESSORS)
            if name == "wavefront":
                most -= most % min(most, module.num_layers)  # teams of the same size
            if name == "directions":
                most = 2  # too little work for more
            assert name == "chosen" or ways == {(name, most)}


@pytest.mark.parametrize("layers", [2, 3, 5])
@pytest.mark.parametrize(
    ("T", "B", "H"), [(2, 1, 5), (7, 1, 20), (70, 1, 33), (40, 3, 17), (37, 9, 40)]
)
@pytest.mark.parametrize("cell", CELLS)
def test_stacks(partition, cell, T, B, H, layers):
    torch.manual_seed(0)
    module = cell(H + 3, H, layers)
    x = torch.randn(T, B, H + 3, requires_grad=True)
    same_everywhere(partition, module, x, {"reset": torch.rand(T, B) < 0.1})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("cell", CELLS)
def test_dtypes(partition, cell, dtype):
    torch.manual_seed(0)
    module = cell(9, 21, 3, dtype=dtype, batch_first=True)
    x = torch.randn(2, 50, 9, dtype=dtype, requires_grad=True)
    same_everywhere(partition, module, x, {})


@pytest.mark.parametrize("cell", CELLS)
def test_packed(partition, cell):
    torch.manual_seed(0)
    module = cell(9, 21, 3)
    x = torch.randn(60, 4, 9, requires_grad=True)
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor([60, 41, 3, 1]))
    same_everywhere(partition, module, packed, {})


def test_other_stacks(partition):
    torch.manual_seed(0)
    x = torch.randn(40, 2, 9, requires_grad=True)
    same_everywhere(partition, rnnfast.LSTM(9, 40, 3, proj_size=11), x, {})
    same_everywhere(partition, rnnfast.LSTM(9, 20, 3), x, {"return_cell_states": True})
    same_everywhere(partition, rnnfast.GRU(9, 20, 3, reset_after=False), x, {})
    both = rnnfast.LSTM(9, 20, 2, bidirectional=True)
    same_everywhere(partition, both, x, {}, ("rows", "units", "directions"))
    single = rnnfast.LSTM(9, 20)
    same_everywhere(partition, single, x, {}, ("rows", "units"))
    same_everywhere(partition, rnnfast.LSTM(9, 20, 3, dropout=0.5).eval(), x, {})


def test_only_what_is_wanted(partition):
    """The lowest layers are frozen: backward ends above them."""
    torch.manual_seed(0)
    module, x = rnnfast.LSTM(9, 20, 4), torch.randn(40, 1, 9)
    for name, p in module.named_parameters():
        p.requires_grad_("l0" not in name and "l1" not in name)
    wanted = [p for p in module.parameters() if p.requires_grad]

    def grads():
        return torch.autograd.grad(module(x)[0].sin().sum(), wanted)

    partition("one", 1)
    expected = grads()
    partition("wavefront", 2)
    assert all(torch.equal(a, b) for a, b in zip(grads(), expected, strict=True))
    assert _C.used_partition() == ("wavefront", 2)


def test_frozen_weights(partition):
    torch.manual_seed(0)
    module, x = rnnfast.GRU(9, 20, 3), torch.randn(40, 1, 9)
    with torch.no_grad():
        partition("one", 1)
        expected = module(x)[0]
        with rnnfast.frozen(module):
            for number in (2, 3):
                partition("wavefront", number)
                assert torch.equal(module(x)[0], expected)
                assert _C.used_partition() == ("wavefront", number)


def test_unknown_partition():
    with pytest.raises(ValueError, match="partition is 'columns'; expected one of 'chosen', 'one'"):
        _C.force_partition("columns")


def test_no_more_threads_than_processors(python):
    """Their barriers would wait for time slices."""
    code = """
import os, torch, rnnfast
from rnnfast import _C

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
torch.set_num_threads(8)
module, x = rnnfast.LSTM(64, 64), torch.randn(100, 4, 64)
for options, expected in (({}, ("one", 1)), ({"oversubscribe": True}, ("units", 4))):
    _C.force_partition("units", **options)
    with torch.no_grad():
        module(x)
    assert _C.used_partition() == expected, _C.used_partition()
"""
    python(code)


@pytest.mark.skipif(PROCESSORS < 2, reason="one processor")
def test_a_wavefront_only_where_it_helps(python):
    # The first call of a process knows nothing yet of what keeps the processors busy.
    code = """
import torch, rnnfast
from rnnfast import _C

def way(module, T, B):
    torch.set_num_threads(2)
    with torch.no_grad():
        module(torch.randn(T, B, module.input_size))
    return _C.used_partition()[0]

assert way(rnnfast.LSTM(64, 64, 2), 100, 1) == "wavefront"
assert way(rnnfast.LSTM(64, 64, 2), 1, 1) == "one"  # no step to follow
assert way(rnnfast.LSTM(64, 64, 2), 100, 0) == "one"
assert way(rnnfast.LSTM(512, 512, 2), 20, 1) != "wavefront"  # half of a layer fits a cache
assert way(rnnfast.LSTM(8, 8, 12), 200_000, 1) != "wavefront"  # a buffer for every layer
"""
    python(code)
