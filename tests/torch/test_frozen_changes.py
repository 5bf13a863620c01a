"""rnnfast.frozen: changes of weights that it notices, and those that it does not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.utils import parametrizations, prune
from torch.optim import swa_utils

import rnnfast
from noticed import assert_noticed, frames, lstm, outputs, same
from rnnfast.stack import ops, packed_weights
from rnnfast.stack.config import StackConfig
from seeds import seed
from twins import flatten


def set_to(name, make):
    """Replace what a module's recurrent weight has under a name."""
    return lambda m: setattr(m.weight_hh_l0, name, make(m.weight_hh_l0.data))


def without_grad(f):
    return torch.no_grad()(lambda module: f(module.weight_hh_l0))


def in_inference_mode(module):
    with torch.inference_mode():
        module.weight_hh_l0.mul_(2)


def averaged(copy_back, **options):
    """Weights averaged over others, in an AveragedModel or copied back from one."""

    def change(module):
        other = copy.deepcopy(module)
        average = swa_utils.AveragedModel(module, **options)
        for _ in range(2):
            torch.nn.init.normal_(other.weight_hh_l0)
            average.update_parameters(other)
        with torch.no_grad():
            copy_back(module, average.module)

    return change


def copy_weights(module, of):
    for weight, source in zip(module.parameters(), of.parameters(), strict=True):
        weight.copy_(source)


@torch.library.custom_op("rnnfast_test::double", mutates_args=["x"])
def double(x: torch.Tensor) -> None:
    x.mul_(2)


def compiled_write(module):
    torch._dynamo.reset()
    write = torch.compile(lambda weight: weight.mul_(2), backend="aot_eager")
    with torch.no_grad():
        write(module.weight_hh_l0)


def replaced(module):
    module.weight_hh_l0 = torch.nn.Parameter(torch.randn_like(module.weight_hh_l0))


def assigned(module):
    module.load_state_dict(
        {name: torch.randn_like(t) for name, t in module.state_dict().items()}, assign=True
    )


def with_other_strides(module):
    """At the same address: its first row in the place of all, and back."""
    weight = module.weight_hh_l0
    weight.data = weight.data.as_strided((68, 17), (17 if weight.stride(0) == 0 else 0, 1))


def memory_used_again(free):
    """Free a weight's memory and give it a new one: often the allocator returns the same address."""

    def change(module):
        weight = module.weight_hh_l0
        free(weight)
        weight.data = torch.randn(68, 17)

    return change


CHANGES = {
    "in place": without_grad(lambda w: w.mul_(2)),
    "of detach()": lambda m: m.weight_hh_l0.detach().mul_(2),
    "of a view": without_grad(lambda w: w[3:5].neg_()),
    "of state_dict()": lambda m: m.state_dict()["weight_hh_l0"].neg_(),
    "an index": without_grad(lambda w: w.__setitem__((3, slice(None)), torch.randn(17))),
    "out=": without_grad(lambda w: torch.add(w, 1, out=w)),
    "init": lambda m: torch.nn.init.normal_(m.weight_hh_l0),
    "_foreach_add_": without_grad(lambda w: torch._foreach_add_([w], 1.0)),
    "_foreach_mul_": without_grad(lambda w: torch._foreach_mul_([w], [2.0])),
    "_foreach_copy_": without_grad(lambda w: torch._foreach_copy_([w], [torch.randn(68, 17)])),
    "in inference mode": in_inference_mode,
    "an operator with mutates_args": without_grad(lambda w: double(w)),
    "compiled": compiled_write,
    "set_": without_grad(lambda w: w.set_(torch.randn(68, 17))),
    "as_strided_": without_grad(lambda w: w.as_strided_((68, 17), (17, 1)).neg_()),
    "data of another tensor": set_to("data", torch.randn_like),
    "data of other strides": with_other_strides,
    "memory used again, shared": memory_used_again(lambda w: w.share_memory_()),
    "memory used again, freed": memory_used_again(lambda w: w.untyped_storage().resize_(0)),
    "vector_to_parameters": lambda m: torch.nn.utils.vector_to_parameters(
        torch.randn(68 * 22), m.parameters()
    ),
    "load_state_dict": lambda m: m.load_state_dict(
        {name: torch.randn_like(t) for name, t in m.state_dict().items()}
    ),
    "load_state_dict, assign": assigned,
    "another parameter": replaced,
    "average, load_state_dict": averaged(lambda m, of: m.load_state_dict(of.state_dict())),
    "average, copy_": averaged(copy_weights),
    "ema, copy_": averaged(copy_weights, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5)),
    "to": lambda m: torch.nn.init.normal_(m.to(torch.float64).to(torch.float32).weight_hh_l0),
    "share_memory_": lambda m: m.weight_hh_l0.share_memory_().detach().mul_(2),
    "requires_grad_": lambda m: m.weight_hh_l0.requires_grad_(False).mul_(2),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(change, autocast):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        # Often: where memory is used again decides the allocator.
        assert_noticed(lstm(), CHANGES[change], times=2 if change == "compiled" else 8)


@pytest.mark.parametrize(
    "update", [None, swa_utils.get_ema_multi_avg_fn(), swa_utils.get_swa_multi_avg_fn()]
)
def test_a_frozen_average(update):
    module = lstm()
    average = swa_utils.AveragedModel(module, multi_avg_fn=update)

    def change(_):
        torch.nn.init.normal_(module.weight_hh_l0)
        average.update_parameters(module)

    assert_noticed(average.module, change, times=3)


def test_a_transposed_weight():
    seed(3)
    module = rnnfast.RNN(5, 17)
    assert_noticed(module, without_grad(lambda w: w.t_()), held=False)
    assert_noticed(module, set_to("data", lambda w: w.t()), held=False)


def test_swapped_tensors():
    """Of a cell: layers hold weak references to their weights, and torch swaps no such tensors."""
    seed(3)
    cell, x = rnnfast.GRUCell(5, 17), torch.randn(2, 5)
    with torch.no_grad(), rnnfast.frozen(cell):
        for _ in range(3):
            before = outputs(cell, x)
            other = torch.nn.Parameter(torch.randn_like(cell.weight_ih))
            torch.utils.swap_tensors(cell.weight_ih, other)
            got = outputs(cell, x)
            assert same(got, outputs(copy.deepcopy(cell), x))
            assert not same(got, before)


def doubled(module):
    module.double()


def half_and_back(module):
    torch.nn.init.normal_(module.half().float().weight_hh_l0)


def bfloat16(module):
    module.bfloat16()


def with_another_function(module):
    module.mode, module.nonlinearity = "RNN_RELU", "relu"


def fewer_units(module):
    module.weight_ih_l0.data = module.weight_ih_l0.data[:13]
    module.weight_hh_l0.data = module.weight_hh_l0.data[:13, :13]
    module.hidden_size = 13


@pytest.mark.parametrize(
    "change", [doubled, half_and_back, bfloat16, with_another_function, fewer_units]
)
def test_other_modules_of_the_same_weights(change):
    module, x = rnnfast.RNN(5, 17, bias=False), frames()
    with torch.no_grad(), rnnfast.frozen(module):
        outputs(module, x)
        change(module)
        x = x.to(module.weight_ih_l0.dtype)
        got = outputs(module, x)
        assert packed_weights.HELD[module].copy.versions == [w._version for w in module.parameters()]
        unfrozen = copy.deepcopy(module)
    assert same(got, outputs(unfrozen, x))


def pruned(module):
    with torch.no_grad():
        prune.l1_unstructured(module, "weight_hh_l0", 0.5)


def made_permanent(module):
    pruned(module)
    prune.remove(module, "weight_hh_l0")


def parametrized(module):
    parametrizations.weight_norm(module, "weight_hh_l0")
    with torch.no_grad():
        module.parametrizations.weight_hh_l0.original0.mul_(2)


def and_no_longer(module):
    parametrized(module)
    torch.nn.utils.parametrize.remove_parametrizations(module, "weight_hh_l0")


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("change", [pruned, made_permanent, parametrized, and_no_longer])
def test_weights_that_are_computed(change, autocast):
    held = change in (made_permanent, and_no_longer)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert_noticed(lstm(), change, times=1, held=held)


@pytest.mark.parametrize("autocast", [False, True])
def test_functional_call(autocast):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with_other_weights(lstm(), frames())


def with_other_weights(module, x):
    want = outputs(module, x)
    others = [{name: torch.randn_like(w) for name, w in module.named_parameters()} for _ in range(3)]
    with torch.no_grad(), rnnfast.frozen(module):
        for weights in (*others, *others):
            unfrozen = copy.deepcopy(module)
            unfrozen.load_state_dict(weights)
            got = torch.func.functional_call(module, weights, (x,))
            assert same(flatten(got), outputs(unfrozen, x))
            assert same(outputs(module, x), want)


def test_every_weight_of_a_stack():
    seed(3)
    module = rnnfast.LSTM(5, 17, num_layers=2, bidirectional=True, proj_size=3)
    for weight in module.parameters():

        def elsewhere(_, weight=weight):
            weight.data = torch.randn_like(weight)

        def in_place(_, weight=weight):
            torch.nn.init.normal_(weight)

        assert_noticed(module, elsewhere)
        assert_noticed(module, in_place)


def test_what_is_packed_knows_its_weights():
    weights = [torch.randn(shape) for shape in [(16, 3), (16, 2), (16,), (16,), (2, 4)]]
    packed = ops.pack(StackConfig("lstm", projected=True), weights)
    assert packed.is_of(weights)
    assert packed.is_of([w.view(w.shape) for w in weights])
    for at, weight in enumerate(weights):
        is_bias = weight.dim() == 1  # read at every call
        others = [weight.clone(), weight[:1], weight[:1].expand(weight.shape), weight.view(torch.int32)]
        for other in (*others, weight.to("meta"), None, 3):
            assert packed.is_of([*weights[:at], other, *weights[at + 1 :]]) == is_bias
    assert not packed.is_of(weights[:4])
    with pytest.raises(TypeError, match="incompatible arguments"):
        packed.is_of(tuple(weights))


def by_numpy(weight):
    array = weight.detach().numpy()
    array *= 2


def fused_by_hand(weight):
    torch._fused_sgd_(
        *([weight], [torch.randn_like(weight)], []),
        **{"weight_decay": 0.0, "momentum": 0.0, "lr": 0.1, "dampening": 0.0},
        **{"nesterov": False, "maximize": False, "is_first_step": True},
    )


def with_an_old_version(weight):
    with torch.autograd._unsafe_preserve_version_counter(weight):
        weight.mul_(2)


library = torch.library.Library("rnnfast_test", "FRAGMENT")
library.define("double_unseen(Tensor(a!) x) -> ()")
library.impl("double_unseen", by_numpy, "CPU")

NOT_NOTICED = {
    "data": lambda w: w.data.mul_(2),
    "numpy": by_numpy,
    "dlpack": lambda w: torch.from_dlpack(w.detach()).mul_(2),
    "storage": lambda w: w.untyped_storage().fill_(1),
    "apply_": lambda w: w.detach().apply_(lambda number: 2 * number),
    "map_": lambda w: w.detach().map_(torch.randn(68, 17), lambda a, b: a + b),
    "fused by hand": fused_by_hand,
    "another library": lambda w: torch.ops.rnnfast_test.double_unseen(w),
    "version set back": with_an_old_version,
}


@pytest.mark.parametrize("change", NOT_NOTICED)
@pytest.mark.parametrize("inside", [False, True])
def test_a_context_entered_anew(change, inside):
    """What the docstring says is not noticed is not, and then helps what it says."""
    module, x = lstm(), frames()
    outer, inner = rnnfast.frozen(module), rnnfast.frozen(module)
    with torch.no_grad(), outer:
        before = outputs(module, x)
        NOT_NOTICED[change](module.weight_hh_l0)
        assert same(outputs(module, x), before)
        if inside:
            with inner:
                got = outputs(module, x)
            assert same(outputs(module, x), got)
    if not inside:
        with inner:
            got = outputs(module, x)
    assert not same(got, before)
    assert same(got, outputs(copy.deepcopy(module), x))
