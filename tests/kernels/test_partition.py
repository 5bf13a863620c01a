"""Who computes what never changes a bit: one thread, rows, hidden units, or a wavefront over layers."""

from __future__ import annotations

import os

import pytest
import torch

import rnnfast
from rnnfast import _C
from seeds import seed
from threads import set_threads

CELLS = [rnnfast.LSTM, rnnfast.GRU, rnnfast.RNN]
PROCESSORS = len(os.sched_getaffinity(0))


@pytest.fixture
def partition():
    """Forces one, among more threads than there are processors too."""

    def force(name, number):
        _C.force_partition(name, oversubscribe=True)
        set_threads(number)

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
    seed(1)
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
            most = number
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
    seed(0)
    module = cell(H + 3, H, layers)
    x = torch.randn(T, B, H + 3, requires_grad=True)
    same_everywhere(partition, module, x, {"reset": torch.rand(T, B) < 0.1})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("cell", CELLS)
def test_dtypes(partition, cell, dtype):
    seed(0)
    module = cell(9, 21, 3, dtype=dtype, batch_first=True)
    x = torch.randn(2, 50, 9, dtype=dtype, requires_grad=True)
    same_everywhere(partition, module, x, {})


@pytest.mark.parametrize("cell", CELLS)
def test_packed(partition, cell):
    seed(0)
    module = cell(9, 21, 3)
    x = torch.randn(60, 4, 9, requires_grad=True)
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor([60, 41, 3, 1]))
    same_everywhere(partition, module, packed, {})


@pytest.mark.parametrize("number", [4, 6])
@pytest.mark.parametrize("cell", CELLS)
def test_a_team_for_each_group_of_rows(partition, cell, number):
    """Backward runs many rows in two groups. Each half of a team has one, and its own barriers."""
    seed(0)
    module, x = cell(9, 70), torch.randn(60, 10, 9, requires_grad=True)
    partition("one", 1)
    expected, _ = results(module, x, {})
    for name in ("units", "rows"):
        partition(name, number)
        found, ways = results(module, x, {})
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), name
        assert ways == {(name, number)}


def test_many_rows_in_a_wavefront(partition):
    """Backward runs them in two groups, and a layer could not follow two groups of another."""
    seed(0)
    module, x = rnnfast.LSTM(9, 20, 3), torch.randn(60, 10, 9, requires_grad=True)
    partition("one", 1)
    expected, _ = results(module, x, {})
    partition("wavefront", 3)
    found, ways = results(module, x, {})
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert ("wavefront", 3) in ways  # forward
    assert len(ways) > 1


def test_other_stacks(partition):
    seed(0)
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
    seed(0)
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


@pytest.mark.parametrize("wanted", ["l0", "l0_reverse", "l1_reverse"])
@pytest.mark.parametrize("cell", CELLS)
def test_only_the_weights_of_one_direction(cell, wanted):
    """The other direction of the layer then needs less memory."""
    seed(0)
    module, x = cell(9, 40, 2, bidirectional=True), torch.randn(40, 3, 9)
    names = [name for name, _ in module.named_parameters() if name.endswith(wanted)]

    def grads():
        return torch.autograd.grad(module(x)[0].sin().sum(), [getattr(module, n) for n in names])

    expected = grads()
    for name, p in module.named_parameters():
        p.requires_grad_(name in names)
    assert all(torch.equal(a, b) for a, b in zip(grads(), expected, strict=True))


def test_frozen_weights(partition):
    seed(0)
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
for options, expected in (({}, ("one", 1)), ({"oversubscribe": True}, ("units", 8))):
    _C.force_partition("units", **options)
    with torch.no_grad():
        module(x)
    assert _C.used_partition() == expected, _C.used_partition()
"""
    python(code)


FEWER_THREADS = """
import os, torch, rnnfast
from rnnfast import _C

def results(module, x):
    y, _ = module(x)
    return [y, *torch.autograd.grad(y.sin().sum(), module.parameters())]

torch.manual_seed(0)
limit = int(os.environ["OMP_THREAD_LIMIT"])
for partition, module in {
    "rows": rnnfast.LSTM(5, 40),
    "units": rnnfast.GRU(5, 40),
    "directions": rnnfast.GRU(5, 200, bidirectional=True),
    "wavefront": rnnfast.RNN(5, 40, 5),
    "wavefront of teams": rnnfast.LSTM(5, 40, 2),
}.items():
    x = torch.randn(20, 20, 5)
    _C.force_partition("one")
    torch.set_num_threads(1)
    expected = results(module, x)
    _C.force_partition(partition.split()[0], oversubscribe=True)
    torch.set_num_threads(4)
    found = results(module, x)
    assert all(map(torch.equal, found, expected)), partition
    assert _C.used_partition() == (partition.split()[0], limit), _C.used_partition()
"""


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_fewer_threads_than_a_call_asks_for(python, limit):
    """OpenMP may start fewer. They take over the layers and the directions of the others."""
    python(FEWER_THREADS, OMP_THREAD_LIMIT=str(limit))


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
