"""Programs that write tensors to `_flat_weights`, the list of torch.nn: LoRA, weight drop."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnfast
from twins import LAYERS, flatten, twins

every_cell = pytest.mark.parametrize("cell", LAYERS)


class Adapted:
    """A forward pre-hook that adds a product of two small matrices to the recurrent weight."""

    def __init__(self, layer):
        rows, columns = layer.weight_hh_l0.shape
        self.a = torch.randn(rows, 2, requires_grad=True)
        self.b = torch.randn(2, columns, requires_grad=True)

    def __call__(self, layer, _):
        weights = {name: getattr(layer, name) for name in layer._flat_weights_names}
        weights["weight_hh_l0"] = weights["weight_hh_l0"] + self.a @ self.b
        layer._flat_weights = list(weights.values())


def adapted(cell, **options):
    """A layer of rnnfast and one of torch.nn with the same weights and the same hook."""
    ours, theirs = twins(cell, 3, 4, **options)
    hook = Adapted(ours)
    for layer in (ours, theirs):
        layer.register_forward_pre_hook(hook)
    return ours, theirs, hook


def inputs():
    x = torch.randn(5, 2, 3)
    return [x, x[:, 0], pack_padded_sequence(x, torch.tensor([5, 3]))]


def assert_same(ours, theirs):
    for x in inputs():
        (y, h), (want_y, want_h) = ours(x), theirs(x)
        if isinstance(y, PackedSequence):
            y, want_y = y.data, want_y.data
        for a, b in zip(flatten((y, h)), flatten((want_y, want_h)), strict=True):
            torch.testing.assert_close(a, b, check_dtype=False)


@every_cell
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_every_kind_of_call(cell, options, mode):
    ours, theirs, _ = adapted(cell, **options)
    with mode():
        assert_same(ours, theirs)
        with rnnfast.frozen(ours):
            assert_same(ours, theirs)
            assert_same(ours, theirs)


@every_cell
def test_gradients_reach_what_the_weights_come_from(cell):
    ours, theirs, hook = adapted(cell)
    for layer in (ours, theirs):
        layer.requires_grad_(False)
    x = torch.randn(5, 2, 3)
    got, want = (
        torch.autograd.grad(layer(x)[0].square().sum(), [hook.a, hook.b]) for layer in (ours, theirs)
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@every_cell
def test_one_entry(cell):
    ours, theirs = twins(cell, 3, 4)
    for mode in (torch.no_grad, torch.enable_grad):
        other = torch.randn_like(ours.weight_hh_l0)
        for layer in (ours, theirs):
            layer._flat_weights[1] = other
        with mode():
            assert_same(ours, theirs)


@every_cell
def test_a_later_assignment_counts(cell):
    """As in torch: the list follows an attribute that is assigned anew."""
    ours, theirs = twins(cell, 3, 4)
    for layer in (ours, theirs):
        layer._flat_weights[1] = torch.zeros_like(layer.weight_hh_l0)
    other = torch.nn.Parameter(torch.randn_like(ours.weight_hh_l0))
    for layer in (ours, theirs):
        layer.weight_hh_l0 = other
    with torch.no_grad():
        assert_same(ours, theirs)


@every_cell
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(cell, backend):
    ours, _, _ = adapted(cell)

    def run(x):
        return ours(x)[0]

    x = torch.randn(5, 2, 3)
    compiled = torch.compile(run, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), run(x))


def test_a_list_of_another_length():
    """torch.nn raises the error."""
    ours, theirs = twins("gru", 3, 4)
    for layer in (ours, theirs):
        del layer._flat_weights[3]
    found = []
    for layer in (ours, theirs):
        with torch.no_grad(), pytest.raises(RuntimeError) as error:
            layer(torch.randn(5, 2, 3))
        found.append(str(error.value))
    assert found[0] == found[1]
