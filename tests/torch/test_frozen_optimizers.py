"""rnnfast.frozen: steps of optimizers are noticed, whoever takes them, and in which thread."""

from __future__ import annotations

import copy
import inspect
import sys
import threading

import pytest
import torch
from torch.optim import optimizer as torch_optimizer

import rnnfast
from noticed import assert_noticed, frames, lstm, outputs, same
from rnnfast.stack import ops, packed_weights

OPTIMIZERS = [
    kind
    for kind in vars(torch.optim).values()
    if isinstance(kind, type)
    and issubclass(kind, torch.optim.Optimizer)
    and kind is not torch.optim.Optimizer
]
IMPLEMENTATIONS = ["foreach", "fused", "capturable", "differentiable"]
EVERY_STEP = [
    pytest.param(kind, options, id="-".join([kind.__name__, *options]))
    for kind in OPTIMIZERS
    for options in (
        {},
        *({name: True} for name in IMPLEMENTATIONS if name in inspect.signature(kind).parameters),
    )
]


def optimizer_of(module, kind, options=None):
    """An optimizer with gradients to take a step with."""
    options = options or {}
    for weight in module.parameters():
        weight.requires_grad_("differentiable" not in options)
        grad = torch.randn_like(weight)
        weight.grad = grad.to_sparse() if kind is torch.optim.SparseAdam else grad
    return kind(module.parameters(), **options)


def step(optimizer):
    optimizer.step(lambda: torch.zeros(()))


@pytest.mark.parametrize(("kind", "options"), EVERY_STEP)
def test_every_optimizer(kind, options):
    torch._dynamo.reset()
    compiles = "capturable" in options  # on the CPU torch takes such steps only where it compiles them

    def change(module):
        optimizer = optimizer_of(module, kind, options)
        take = torch.compile(step, backend="eager") if compiles else step
        take(optimizer)

    assert_noticed(lstm(), change, times=1 if compiles else 2)


def test_there_are_fused_optimizers():
    """Theirs are the steps that raise no version."""
    fused = {case.values[0].__name__ for case in EVERY_STEP if "fused" in case.values[1]}
    assert fused >= {"SGD", "Adam", "AdamW", "Adagrad"}


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_step(options, backend):
    torch._dynamo.reset()
    module = lstm()
    optimizer = optimizer_of(module, torch.optim.Adam, options)
    compiled = torch.compile(optimizer.step, backend=backend)
    assert_noticed(module, lambda _: compiled(), times=3)


def test_contexts_do_not_compile_a_step_anew():
    torch._dynamo.reset()
    module = lstm()
    compiled = torch.compile(optimizer_of(module, torch.optim.Adam).step, backend="eager")
    counts = []
    for _ in range(4):
        with rnnfast.frozen(module):
            compiled()
        compiled()
        counts.append(sum(torch._dynamo.utils.counters["frames"].values()))
    assert counts[0] > 0
    assert counts[1:] == counts[:1] * 3


@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=str)
def test_steps_elsewhere(options):
    """In inference mode, and in another thread."""

    def in_inference_mode(module):
        with torch.inference_mode():
            step(optimizer_of(module, torch.optim.SGD, options))

    def in_a_thread(module):
        optimizer = optimizer_of(module, torch.optim.SGD, options)
        thread = threading.Thread(target=step, args=(optimizer,))
        thread.start()
        thread.join()

    assert_noticed(lstm(), in_inference_mode)
    assert_noticed(lstm(), in_a_thread)


class Foreign(torch.optim.Optimizer):
    """As those whose kernels are another library's: torch sees nothing of what they write."""

    def __init__(self, parameters, between=lambda: None):
        super().__init__(parameters, {})
        self.between = between

    def step(self, closure=None):
        for weight in self.param_groups[0]["params"]:
            weight.data.sub_(weight.grad)
            self.between()


def test_optimizers_of_other_libraries():
    assert_noticed(lstm(), lambda module: step(optimizer_of(module, Foreign)))


def test_a_call_between_two_weights():
    module, x = lstm(), frames()
    optimizer = optimizer_of(module, Foreign, {"between": lambda: outputs(module, x)})
    assert_noticed(module, lambda _: step(optimizer))


def test_a_step_that_fails_between_two_weights():
    def fail():
        raise ArithmeticError

    def change(module):
        with pytest.raises(ArithmeticError):
            step(optimizer_of(module, Foreign, {"between": fail}))

    assert_noticed(lstm(), change)


def test_an_optimizer_of_no_class_of_torch():
    def change(module):
        with torch.no_grad():
            for weight in module.parameters():
                weight -= torch.ones_like(weight)

    assert_noticed(lstm(), change)


def test_hooks_are_registered_once():
    with rnnfast.frozen(lstm()):
        pass
    hooks = [
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    ]
    before = [dict(each) for each in hooks]
    with rnnfast.frozen(lstm()), rnnfast.frozen(lstm()):
        assert [dict(each) for each in hooks] == before
    assert [dict(each) for each in hooks] == before


def test_a_step_while_another_thread_packs(monkeypatch):
    module, x = lstm(), frames()
    optimizer = optimizer_of(module, torch.optim.SGD, {"fused": True})
    packs, stepped, pack = threading.Event(), threading.Event(), ops.pack

    def slow_pack(*args):
        found = pack(*args)
        if threading.current_thread() is not threading.main_thread():
            packs.set()
            assert stepped.wait(60)
        return found

    monkeypatch.setattr(ops, "pack", slow_pack)
    with torch.no_grad(), rnnfast.frozen(module):
        thread = threading.Thread(target=outputs, args=(module, x))
        thread.start()
        assert packs.wait(60)
        step(optimizer)
        want = outputs(copy.deepcopy(module), x)
        assert same(outputs(module, x), want)
        stepped.set()
        thread.join()
        assert same(outputs(module, x), want)


def test_threads():
    """Some call, some enter and leave, one changes the weights; what they leave is not old."""
    module, x = lstm(), frames()
    interval, done, errors = sys.getswitchinterval(), threading.Event(), []

    def repeat(job):
        try:
            while not done.is_set():
                job()
        except Exception as error:
            errors.append(error)

    def call():
        assert all(torch.isfinite(y).all() for y in outputs(module, x))

    def enter():
        with rnnfast.frozen(module):
            call()

    optimizer = optimizer_of(module, torch.optim.SGD, {"fused": True})
    threads = [threading.Thread(target=repeat, args=(job,)) for job in (call, call, enter, enter)]
    sys.setswitchinterval(1e-5)
    try:
        with rnnfast.frozen(module):
            for thread in threads:
                thread.start()
            for _ in range(200):
                step(optimizer)
                want = outputs(copy.deepcopy(module), x)
                assert same(outputs(module, x), want)
            done.set()
            for thread in threads:
                thread.join()
            assert same(outputs(module, x), outputs(copy.deepcopy(module), x))
    finally:
        done.set()
        sys.setswitchinterval(interval)
    assert not errors
    assert not packed_weights.HELD
