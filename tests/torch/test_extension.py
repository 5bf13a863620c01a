"""The extension by itself: it checks all that it is given, whatever the Python above it has checked.

A size that it took for granted would be an address out of bounds. A call that fails writes nothing.
"""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import rnnfast
from misfits import misfits
from rnnfast import _C
from rnnfast.stack.config import CELLS
from seeds import seed

T, B, I, H, R = 4, 3, 5, 6, 2
LAYERS = DIRECTIONS = 2
WEIGHTS = ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr")


def stack_of(cell="lstm", **options):
    return _C.Stack(cell=CELLS[cell].number, **options)


class Call:
    """A stack with all that a call can have: two layers and directions, lengths, resets, norms."""

    def __init__(self):
        seed(0)
        self.stack = stack_of(
            "lstm", layers=LAYERS, directions=DIRECTIONS, projected=True, cell_states=True
        )
        numbers = LAYERS * DIRECTIONS
        shapes = {
            "x": (T, B, I),
            "h0": (numbers, B, R),
            "c0": (numbers, B, H),
            "y": (T, B, DIRECTIONS * R),
            "h_n": (numbers, B, R),
            "c_n": (numbers, B, H),
            "cell_states": (T, B, DIRECTIONS * H),
        }
        self.weights = []
        for number in range(numbers):
            width = I if number < DIRECTIONS else DIRECTIONS * R
            for name, shape in zip(
                WEIGHTS, [(4 * H, width), (4 * H, R), (4 * H,), (4 * H,), (R, H)], strict=True
            ):
                self.weights.append(f"{name}{number}")
                shapes[f"{name}{number}"] = shape
        shapes |= {f"d{name}": shape for name, shape in shapes.items()}
        self.tensors = {name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}
        block = self.stack.new_saved("float32", T * B, H, R)
        self.tensors |= {
            "sizes": torch.tensor([3, 0, 2]),  # none has all steps
            "reset": torch.rand(T, B) < 0.3,
            "saved": torch.frombuffer(block, dtype=torch.uint8),
            "dh_norms": torch.ones(LAYERS, DIRECTIONS, T, dtype=torch.float64),
            "dc_norms": torch.ones(LAYERS, DIRECTIONS, T, dtype=torch.float64),
        }

    def written(self):
        names = ["y", "h_n", "c_n", "cell_states", "dx", "dh0", "dc0", "dh_norms", "dc_norms"]
        return [self.tensors[name] for name in (*names, *(f"d{name}" for name in self.weights))]

    def of(self, *names):
        return tuple(self.tensors[name] for name in names)

    def inputs(self):
        return (*self.of("x", "h0", "c0"), list(self.of(*self.weights)), *self.of("sizes", "reset"))

    def forward(self):
        self.stack.forward(1, self.inputs(), self.of("y", "h_n", "c_n", "cell_states", "saved"))

    def backward(self):
        grads = list(self.of(*(f"d{name}" for name in self.weights)))
        given = self.of("dy", "dh_n", "dc_n", "dcell_states")
        wanted = (*self.of("dx", "dh0", "dc0"), grads, *self.of("dh_norms", "dc_norms"))
        self.stack.backward(1, self.inputs(), *self.of("y", "saved"), given, wanted)


FORWARD = ["x", "h0", "c0", "sizes", "reset", "y", "h_n", "c_n", "cell_states", "saved"]
FORWARD += [f"{name}{number}" for number in (0, 3) for name in WEIGHTS]
BACKWARD = ["dy", "dh_n", "dc_n", "dcell_states", "dx", "dh0", "dc0", "dh_norms", "dc_norms"]
BACKWARD += [f"d{name}{number}" for number in (0, 3) for name in WEIGHTS]


@pytest.mark.parametrize("name", [*FORWARD, *BACKWARD])
def test_a_tensor_that_does_not_fit(name):
    call = Call()
    right = call.tensors[name]
    # Lengths and resets may have any strides.
    for what, wrong in misfits(right, name not in ("reset", "sizes"), name.endswith("norms")):
        before = [t.clone() for t in call.written()]
        call.tensors[name] = wrong
        runs = [call.forward, call.backward] if name in FORWARD else [call.backward]
        if name in ("h_n", "c_n", "cell_states"):
            runs = [call.forward]  # backward does not read them
        for run in runs:
            with pytest.raises((ValueError, TypeError, RuntimeError)):
                run()
        call.tensors[name] = right
        assert all(map(torch.equal, before, call.written())), what
    call.forward()
    call.backward()


@pytest.mark.parametrize("name", [*FORWARD, *BACKWARD])
def test_an_error_names_the_tensor(name):
    call = Call()
    call.forward()
    call.tensors[name] = call.tensors[name].to(torch.int32)
    is_weight = name.removeprefix("d")[:-1] in WEIGHTS
    words = "lengths" if name == "sizes" else name[:-1] if is_weight else name
    with pytest.raises((TypeError, ValueError), match=f"^{words} has"):
        (call.forward if name in FORWARD else call.backward)()


def test_an_error_names_the_projection_without_biases():
    stack, (w_ih, w_hh, w_hr) = stack_of(bias=False, projected=True), weights_of()
    with pytest.raises(TypeError, match=r"^w_hr has dtype int32"):
        stack.pack(torch.zeros(1, 1, I), [w_ih, w_hh, w_hr.int()])


@pytest.mark.parametrize(
    "name", ["x", "y", "w_ih0", "w_hh0", "w_hr0", "w_ih3", "w_hh3", "w_hr3", "saved"]
)
def test_a_tensor_that_must_be_there(name):
    call = Call()
    call.tensors[name] = None
    if name == "saved":
        call.forward()
    else:
        with pytest.raises(TypeError, match="must not be None"):
            call.forward()
    with pytest.raises(TypeError, match="must not be None"):
        call.backward()


@pytest.mark.parametrize("name", ["y", "h_n", "dx", "dh0"])
def test_outputs_whose_elements_share_memory(name):
    call = Call()
    call.forward()
    call.tensors[name] = call.tensors[name][:1].expand(call.tensors[name].shape)
    with pytest.raises(ValueError, match="share memory"):
        (call.backward if name.startswith("d") else call.forward)()


def test_a_batch_without_gaps_is_not_asked_for():
    """Rows may lie anywhere; only the features of a row lie side by side."""
    call, other = Call(), Call()
    rows = [
        name for name in call.tensors if name not in ("saved", "dh_norms", "dc_norms", "sizes", "reset")
    ]
    for gap, name in enumerate(rows):
        t = other.tensors[name]
        if t.dim() > 1:
            wide = t.new_full((*t.shape[:-2], 2 * t.shape[-2], t.shape[-1] + gap), float("nan"))
            other.tensors[name] = wide[..., ::2, : t.shape[-1]].copy_(t)
    other.tensors["sizes"] = torch.tensor([3, 9, 0, 9, 2, 9])[::2]
    other.tensors["reset"] = call.tensors["reset"].repeat_interleave(3, 1)[:, ::3]
    for each in (call, other):
        each.forward()
        each.backward()
    for a, b in zip(call.written(), other.written(), strict=True):
        assert torch.equal(a, b)


def test_rows_that_end_early():
    """A row of length 0 keeps its initial state. What no step writes is zero, whatever was there."""
    call = Call()
    call.forward()
    call.backward()
    for name in ("y", "cell_states", "dx"):
        for row, length in enumerate(call.tensors["sizes"]):
            assert not call.tensors[name][length:, row].any(), name
    for name in ("dh_norms", "dc_norms"):
        assert call.tensors[name][..., :3].all()
        assert not call.tensors[name][..., 3:].any()
    assert torch.equal(call.tensors["h_n"][:, 1], call.tensors["h0"][:, 1])
    call.tensors["h0"] = call.tensors["c0"] = None
    call.forward()
    assert not call.tensors["h_n"][:, 1].any()
    assert not call.tensors["c_n"][:, 1].any()


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_lengths_from_the_last_step_to_the_first(packed):
    """`reverse` of rows that differ in length is the second direction of a bidirectional stack."""
    weights = [torch.randn(3 * H, I), torch.randn(3 * H, H)]
    sizes = torch.tensor([3, 3, 2, 1]) if packed else torch.tensor([4, 1, 3])
    x = torch.randn(9, I) if packed else torch.randn(6, B, I)
    y, both = torch.empty(*x.shape[:-1], H), torch.empty(*x.shape[:-1], 2 * H)
    for stack, out, count in (
        (stack_of("gru", bias=False, reverse=True), y, 1),
        (stack_of("gru", bias=False, directions=2), both, 2),
    ):
        inputs = (x, None, None, weights * count, sizes, None)
        stack.forward(1, inputs, (out, None, None, None, None))
    assert torch.equal(y, both[..., H:])


def test_batch_sizes_with_gaps_and_of_other_kinds():
    stack, weights = stack_of("gru", bias=False), [torch.randn(3 * H, I), torch.randn(3 * H, H)]
    x = torch.randn(9, I)

    def run(sizes):
        y = torch.zeros(9, H)
        stack.forward(1, (x, None, None, weights, sizes, None), (y, None, None, None, None))
        return y

    want = run(torch.tensor([3, 3, 2, 1]))
    assert torch.equal(run(torch.tensor([3, 7, 3, 7, 2, 7, 1])[::2]), want)
    for wrong in (torch.tensor([3, 3, 2, 1], dtype=torch.int32), torch.tensor([[3, 3, 2, 1]])):
        with pytest.raises(ValueError, match="batch_sizes must be int64 and have one dimension"):
            run(wrong)


def test_what_a_cell_lacks():
    """A GRU has neither a cell state nor a projection."""
    for options in ({"cell_states": True}, {"projected": True}):
        with pytest.raises(ValueError, match="gru has no"):
            stack_of("gru", **options)
    stack = stack_of("gru", bias=False)
    x, y, weights = (
        torch.randn(T, B, I),
        torch.zeros(T, B, H),
        [torch.randn(3 * H, I), torch.randn(3 * H, H)],
    )
    inputs = (x, None, None, weights, None, None)
    state, norms = torch.zeros(1, B, H), torch.zeros(1, 1, T, dtype=torch.float64)
    saved = torch.frombuffer(stack.new_saved("float32", T * B, H, H), dtype=torch.uint8)
    stack.forward(1, inputs, (y, None, None, None, saved))
    for outputs in ((y, None, state, None, None), (y, None, None, y, None)):
        with pytest.raises(ValueError, match="gru has no cell state"):
            stack.forward(1, inputs, outputs)
    for given, wanted in (
        ((None, None, state, None), (None, None, None, [None] * 2, None, None)),
        ((None, None, None, y), (None, None, None, [None] * 2, None, None)),
        ((None,) * 4, (None, None, state, [None] * 2, None, None)),
        ((None,) * 4, (None, None, None, [None] * 2, norms, norms.clone())),
    ):
        with pytest.raises(ValueError, match="gru has no cell state"):
            stack.backward(1, inputs, y, saved, given, wanted)
    with pytest.raises(ValueError, match="dc_norms needs dh_norms"):
        stack.backward(1, inputs, y, saved, (None,) * 4, (None, None, None, [None] * 2, None, norms))


def test_a_precision_below_all():
    with pytest.raises(ValueError, match="precision is -1; expected 0"):
        stack_of(precision=-1)


def test_one_step_of_more_than_one_layer():
    x, weights = torch.randn(B, I), [torch.randn(3 * I, I), torch.randn(3 * I, I)]
    for options, count in (({"layers": 2}, 2), ({"directions": 2}, 2)):
        stack = stack_of("gru", bias=False, **options)
        y = torch.zeros(B, I * options.get("directions", 1))
        with pytest.raises(ValueError, match=r"x has shape \(3, 5\); expected \(T, B, I\)"):
            stack.forward(1, (x, None, None, weights * count, None, None), (y, None, None, None, None))


@pytest.mark.parametrize(("units", "outputs"), [(0, R), (H, 0)])
def test_a_projection_of_nothing(units, outputs):
    stack, x = stack_of("lstm", bias=False, projected=True), torch.randn(T, B, I)
    weights = [torch.zeros(4 * units, I), torch.zeros(4 * units, outputs), torch.zeros(outputs, units)]
    with pytest.raises(ValueError, match="has no columns"):
        stack.forward(
            1, (x, None, None, weights, None, None), (torch.zeros(T, B, outputs), *[None] * 4)
        )


def test_rows_of_one_number():
    """The distance from a number to the next one does not matter."""
    stack, weights = stack_of("gru", bias=False), [torch.randn(3 * H, 1), torch.randn(3 * H, H)]
    x, found = torch.randn(T, B, 3), []
    for given in (x[..., ::3], x[..., :1].contiguous()):
        found.append(torch.zeros(T, B, H))
        stack.forward(1, (given, None, None, weights, None, None), (found[-1], *[None] * 4))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("layers", "rows", "hidden", "outputs"),
    [
        (1, 4, 4, -1),
        (1, 4, -1, 4),
        (1, 4, 4, 2**41),
        (1, 4, 2**41, 4),
        (1, 2**60, 16, 1),  # the slots of a layer
        (2**20, 2**40, 16, 1),  # the slots of all layers
        (1, 2**40, 1, 2**40),  # the outputs of a layer
        (3, 2**40, 1, 2**20),  # of all layers
        (2, 2**40, 2**17, 2**20),  # both together
    ],
)
def test_sizes_of_saved_memory_that_overflow(layers, rows, hidden, outputs):
    with pytest.raises(ValueError, match="out of range"):
        stack_of("lstm", layers=layers).new_saved("float32", rows, hidden, outputs)


OTHERS = {
    "layers": {"layers": 2},
    "directions": {"directions": 2},
    "precision": {"precision": 1},
    "inputs": {"I": I + 1},
    "hidden": {"H": H + 1},
    "outputs": {"R": R + 1},
    "no projection": {"R": 0},
}


def weights_of(layers=1, directions=1, I=I, H=H, R=R, precision=0):
    found = []
    for number in range(layers * directions):
        found += [torch.randn(4 * H, I if number < directions else directions * (R or H))]
        found += [torch.randn(4 * H, R or H)] + ([torch.randn(R, H)] if R else [])
    return found


@pytest.mark.parametrize("other", OTHERS)
def test_packed_weights_of_another_size(other):
    """Panels of fewer numbers than the kernels read."""
    options = OTHERS[other]
    first = stack_of(bias=False, projected=True)
    packed = first.pack(torch.zeros(1, 1, I), weights_of())
    config = {name: value for name, value in options.items() if name not in ("I", "H", "R")}
    second = stack_of(bias=False, projected=options.get("R", R) > 0, **config)
    weights = weights_of(**options)
    x = torch.zeros(T, B, options.get("I", I))
    arguments = ((torch.Tensor,), 1, (x, None, None, weights, None, None), None)
    assert second.call(*arguments, second.pack(x, weights))[0].shape[:2] == (T, B)
    with pytest.raises(ValueError, match="another stack"):
        second.call(*arguments, packed)
    assert not packed.is_of(weights)


@pytest.mark.skipif(len(_C.supported_isas()) < 2, reason="one instruction set")
def test_packed_weights_of_another_instruction_set():
    stack, x, weights = stack_of(bias=False, projected=True), torch.zeros(T, B, I), weights_of()
    packed = stack.pack(x, weights)
    assert packed.is_of(weights)
    _C.force_isa(next(name for name in _C.supported_isas() if name != _C.isa()))
    assert not packed.is_of(weights)
    with pytest.raises(ValueError, match="another stack"):
        stack.call((torch.Tensor,), 1, (x, None, None, weights, None, None), None, packed)


def test_packed_weights_are_of_so_many():
    stack, weights = stack_of(bias=False, projected=True), weights_of()
    packed = stack.pack(torch.zeros(1, 1, I), weights)
    assert packed.is_of(weights)
    for others in (weights[:-1], [*weights, weights[0]], [*weights[:-1], weights[-1][0]]):
        assert not packed.is_of(others)


@pytest.mark.parametrize("state", [0, 1], ids=["h", "c"])
def test_a_state_that_is_lazily_negative(state):
    """Its memory has the negatives of its values."""
    module, x = rnnfast.LSTM(I, H), torch.randn(T, B, I)
    states = [torch.randn(1, B, H) for _ in range(2)]
    lazy = list(states)
    lazy[state] = torch._neg_view(-states[state])
    assert lazy[state].is_neg()
    assert lazy[state].is_contiguous()
    with torch.no_grad():
        want, got = module(x, tuple(states)), module(x, tuple(lazy))
    assert torch.equal(want[0], got[0])


def test_only_the_norms_of_gradients():
    """Of all layers, also where nothing else of the lower ones is wanted."""
    call = Call()
    call.forward()
    call.backward()
    given, norms = call.of("dy", "dh_n", "dc_n", "dcell_states"), torch.zeros(LAYERS, DIRECTIONS, T)
    norms = norms.double()
    wanted = (None, None, None, [None] * len(call.weights), norms, None)
    call.stack.backward(1, call.inputs(), *call.of("y", "saved"), given, wanted)
    assert torch.equal(norms, call.tensors["dh_norms"])


def run(x, y=None):
    """A GRU of zeros in float64."""
    stack, weights = stack_of("gru", bias=False), [np.zeros((3 * H, I)), np.zeros((3 * H, H))]
    y = np.full((T, B, H), np.nan) if y is None else y
    stack.forward(1, (x, None, None, weights, None, None), (y, None, None, None, None))
    return y


def test_an_output_that_may_only_be_read():
    y = np.full((T, B, H), np.nan)
    y.flags.writeable = False
    with pytest.raises((ValueError, BufferError)):
        run(np.zeros((T, B, I)), y)
    assert np.isnan(y).all()


def test_buffers_are_given_back():
    """A bytearray cannot grow while somebody reads it."""
    stack, x = stack_of("gru", bias=False), np.zeros((T, B, I))
    weights, y = [np.zeros((3 * H, I)), np.zeros((3 * H, H))], np.zeros((T, B, H))
    saved = bytearray(memoryview(stack.new_saved("float64", T * B, H, H)).nbytes)
    stack.forward(1, (x, None, None, weights, None, None), (y, None, None, None, saved))
    saved.append(0)


def test_few_types_are_kept():
    """The extension remembers how the memory of a type is read, and keeps the last few types alive."""
    types = []
    for _ in range(8):
        kind = type("Kind", (np.ndarray,), {})
        run(np.zeros((T, B, I)).view(kind))
        types.append(weakref.ref(kind))
    del kind
    gc.collect()
    assert types[-1]() is not None
    assert not any(kind() for kind in types[:4])


def as_old_torch(t, **others):
    """What the extension reads of a tensor of a torch without DLPack's exchange table."""
    attributes = {
        "data_ptr": t.data_ptr,
        "device": t.device,
        "shape": t.shape,
        "stride": t.stride,
        "dtype": t.dtype,
    }
    return SimpleNamespace(**attributes | others)


def test_tensors_of_an_old_torch():
    x = torch.zeros(T, B, 2 * I, dtype=torch.float64)[..., :I]
    y = torch.full((T, B, H), 7, dtype=torch.float64)
    run(as_old_torch(x), as_old_torch(y))
    assert not y.any()
    for wrong, message in (
        ({"device": torch.device("meta")}, "not in CPU memory"),
        ({"shape": (T, B, I, 1), "stride": lambda: (1, 1, 1, 1)}, "4 dimensions"),
        ({"stride": lambda: (B * I, I)}, "its shape and its strides differ in length"),
    ):
        with pytest.raises(ValueError, match=message):
            run(as_old_torch(x, **wrong))
    with pytest.raises(TypeError, match="x has dtype complex128"):
        run(as_old_torch(x, dtype=torch.complex128))


OLD_TORCH = """
import torch
del torch.Tensor.__dlpack_c_exchange_api__
import rnnfast

module = rnnfast.LSTM(3, 4)
y, (h_n, _) = module(torch.randn(5, 2, 3))
assert type(y.grad_fn).__name__ == "_StackBackward", y.grad_fn  # and not torch's own
"""


@pytest.mark.skipif(not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="it has none")
def test_the_kernels_run_with_an_old_torch(python):
    python(OLD_TORCH)


def test_arrays_of_kinds_that_have_no_address_to_read():
    assert not run(np.zeros((T, B, I))).any()
    odd = np.zeros(8 * T * B * I + 1, "u1")[1:].view("f8").reshape(T, B, I)
    with pytest.raises(ValueError, match="not aligned"):
        run(odd)
    records = np.zeros((T, B), [("x", "f8", I), ("more", "f4")])["x"]
    with pytest.raises(ValueError, match="no multiple of its item size"):
        run(records)
    with pytest.raises(TypeError, match="x has dtype int32"):
        run(np.zeros((T, B, I), "i4"))
    with pytest.raises(ValueError, match="4 dimensions"):
        run(np.zeros((T, B, I, 1)))
