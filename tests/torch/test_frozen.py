"""rnnfast.frozen: packed weights held from call to call, with the same bits and never stale."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch

import rnnfast
from reference import CELLS
from rnnfast import _C
from rnnfast.stack import packed_weights
from threads import set_threads
from twins import flatten, make, raised, states

numerics = pytest.mark.numerics  # of the tests that depend on the instruction set

every_cell = pytest.mark.parametrize("cell", CELLS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])

STACKS = [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}, {"bias": False}]


def outputs(module, *args):
    with torch.no_grad():
        return flatten(module(*args))


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@numerics
@every_cell
@every_dtype
@pytest.mark.parametrize("options", STACKS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 5, 17), (1, 9, 3, 33), (7, 3, 17, 65), (2, 1, 257, 130)])
def test_the_same_bits(cell, dtype, options, shape):
    steps, batch, inputs, hidden = shape
    module = make(rnnfast, cell, inputs, hidden, dtype=dtype, **options)
    x = torch.randn(steps, batch, inputs, dtype=dtype)
    want = outputs(module, x)
    with rnnfast.frozen(module):
        for threads in (1, 2, 3):
            set_threads(threads)
            assert same(outputs(module, x), want)
        assert packed_weights.HELD[module].copy is not None
    assert module not in packed_weights.HELD
    assert same(outputs(module, x), want)


@numerics
@every_cell
def test_cells(cell):
    module = make(rnnfast, cell, 5, 37, suffix="Cell")
    x, h = torch.randn(3, 5), states(cell, 3, 37)
    want = outputs(module, x, h)
    with rnnfast.frozen(module):
        assert same(outputs(module, x, h), want)
        assert packed_weights.HELD[module].copy is not None


@numerics
def test_projections():
    module = make(rnnfast, "lstm", 5, 37, 2, proj_size=19)
    x = torch.randn(4, 3, 5)
    want = outputs(module, x)
    with rnnfast.frozen(module):
        assert same(outputs(module, x), want)
        assert same(outputs(module, x[:1]), outputs(copy.deepcopy(module), x[:1]))


@numerics
@every_cell
@pytest.mark.parametrize("suffix", ["", "Cell"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_the_weights_once(cell, suffix, dtype):
    """Float16 is computed in float32: autocast to it casts the weights of a float16 module alone."""
    module = make(rnnfast, cell, 5, 37, suffix=suffix, **({} if suffix else {"num_layers": 2}))
    x = torch.randn(3, 5) if suffix else torch.randn(4, 3, 5)
    half = copy.deepcopy(module).half()
    with torch.autocast("cpu", dtype):
        want, of_half = outputs(module, x), outputs(half, x.half())
        with rnnfast.frozen(module), rnnfast.frozen(half):
            for _ in range(2):
                assert same(outputs(module, x), want)
                assert same(outputs(half, x.half()), of_half)
            held, held_of_half = packed_weights.HELD[module], packed_weights.HELD[half]
            assert (held.converted is None, held.copy is None) == (
                dtype == torch.float16,
                dtype == torch.bfloat16,
            )
            before = held.converted, held.copy, held_of_half.converted
            assert before[2].weights[0].dtype == (torch.float32 if dtype == torch.float16 else dtype)
            outputs(module, x), outputs(half, x.half())
            assert (held.converted, held.copy, held_of_half.converted) == before


@numerics
def test_calls_with_and_without_autocast_in_turn():
    """Float16 is computed in float32 without autocast, and in bfloat16 under autocast to it."""
    module, x = make(rnnfast, "lstm", 5, 37).half(), torch.randn(4, 3, 5).half()

    def both():
        with torch.autocast("cpu", torch.bfloat16):
            low = outputs(module, x)
        return *outputs(module, x), *low

    want = both()
    with rnnfast.frozen(module):
        assert same(both(), want)
        assert same(both(), want)


@numerics
@pytest.mark.parametrize("autocast", [False, True])
def test_every_kind_of_sequence(autocast):
    module = make(rnnfast, "lstm", 5, 37, 2, bidirectional=True, proj_size=3)
    x, lengths = torch.randn(6, 3, 5), torch.tensor([2, 6, 4])
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
    calls = [(x,), (x[:, 0],), (packed,), (x, None, lengths)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        want = [outputs(module, *call) for call in calls]
        with rnnfast.frozen(module):
            outputs(module, x)
            kept = packed_weights.HELD[module].converted, packed_weights.HELD[module].copy
            for call, out in zip(calls, want, strict=True):
                assert same(outputs(module, *call), out)
            assert (packed_weights.HELD[module].converted, packed_weights.HELD[module].copy) == kept


def test_cell_states_need_no_packing_of_their_own():
    module, x = make(rnnfast, "lstm", 5, 17), torch.randn(1, 2, 5)
    with rnnfast.frozen(module), torch.no_grad():
        module(x)
        held = packed_weights.HELD[module].copy
        module(x, return_cell_states=True)
        assert packed_weights.HELD[module].copy is held


def test_gradients_are_as_ever():
    module = rnnfast.GRU(5, 17)
    x = torch.randn(3, 2, 5)
    want = torch.autograd.grad(module(x)[0].square().sum(), list(module.parameters()))
    with rnnfast.frozen(module):
        outputs(module, x)
        got = torch.autograd.grad(module(x)[0].square().sum(), list(module.parameters()))
    assert same(got, want)


def test_contexts_nest_and_release():
    model = torch.nn.ModuleList([rnnfast.LSTM(3, 4), rnnfast.GRUCell(3, 4), torch.nn.Linear(3, 4)])
    with rnnfast.frozen(model):
        with rnnfast.frozen(model[0]):
            assert len(packed_weights.HELD) == 2
        assert len(packed_weights.HELD) == 2
    assert not packed_weights.HELD
    with pytest.raises(KeyError), rnnfast.frozen(model):
        raise KeyError
    assert not packed_weights.HELD


def test_contexts_overlap():
    """As those of two threads do: a module is held until the last one ends."""
    module = rnnfast.LSTM(3, 4)
    first, second = rnnfast.frozen(module), rnnfast.frozen(module)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert module in packed_weights.HELD
    second.__exit__(None, None, None)
    assert module not in packed_weights.HELD


def test_one_thread_at_a_time_enters_or_leaves():
    module = rnnfast.LSTM(3, 4)
    context = rnnfast.frozen(module)
    for act, is_held in (
        (context.__enter__, False),
        (lambda: context.__exit__(None, None, None), True),
    ):
        thread = threading.Thread(target=act)
        with packed_weights._entering_or_leaving:
            thread.start()
            thread.join(0.1)
            assert (module in packed_weights.HELD) == is_held
        thread.join()
        assert (module in packed_weights.HELD) != is_held


def test_copies_and_pickles_inside():
    module = rnnfast.LSTM(5, 17)
    x = torch.randn(1, 2, 5)
    with rnnfast.frozen(module):
        want = outputs(module, x)
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert same(outputs(other, x), want)
            assert other not in packed_weights.HELD


def test_a_bias_that_is_none():
    cell, x = rnnfast.GRUCell(3, 4), torch.randn(2, 3)
    cell.bias_ih = None
    want = raised(lambda: cell(x))
    with torch.no_grad(), rnnfast.frozen(cell):
        assert raised(lambda: cell(x)) == want


@numerics
def test_other_ways_to_run_stay_right():
    """torch.nn's own modules, parametrizations, weights made in inference mode, other dtypes."""
    plain, x = torch.nn.LSTM(5, 17), torch.randn(1, 2, 5)
    normed = torch.nn.utils.parametrizations.weight_norm(rnnfast.LSTM(5, 17), "weight_hh_l0")
    with torch.inference_mode():
        made = rnnfast.LSTM(5, 17)
    half = rnnfast.LSTM(5, 17).bfloat16()
    for module, given in ((plain, x), (normed, x), (made, x), (half, x.bfloat16())):
        want = outputs(module, given)
        with rnnfast.frozen(module):
            assert same(outputs(module, given), want)


def test_packed_weights_of_another_stack():
    x = torch.zeros(2, 1, 3)
    weights = [torch.zeros(16, 3), torch.zeros(16, 4)]
    lstm, gru = (_C.Stack(cell=cell, bias=False) for cell in (2, 3))
    packed = gru.pack(x, [torch.zeros(12, 3), torch.zeros(12, 4)])
    for other in (packed, lstm.pack(x.double(), [w.double() for w in weights])):
        with pytest.raises(ValueError, match="another stack"):
            lstm.call((torch.Tensor,), 1, (x, None, None, weights, None, None), None, other)
    with pytest.raises(ValueError, match="w_hh has shape"):
        lstm.pack(x, [torch.zeros(16, 3), torch.zeros(15, 4)])
