"""Autograd."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, stack_module_state, vmap

from .items import (
    build,
    close,
    example,
    first,
    gradients,
    item,
    loss_of,
    weight,
    weights_of,
)

AUTOGRAD = "Autograd"
SLOWER = "on torch's operators, slower"


@item(AUTOGRAD, "the numbers of torch.nn, forward and backward")
def same_numbers(package, kind):
    module, theirs, x = build(package, kind), build(nn, kind), example(kind)
    close(module(x), theirs(x))
    close(gradients(module, x), gradients(theirs, x))


@item(AUTOGRAD, "double backward (`gradgradcheck`)", note=SLOWER)
def double_backward(package, kind):
    module = build(package, kind, 2, 3).double()
    x = example(kind, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: first(module(x)), x)
    torch.autograd.gradgradcheck(lambda x: first(module(x)), x)


@item(AUTOGRAD, "forward mode: `jvp`, `jacfwd` in float32", note=SLOWER)
def forward_mode(package, kind):
    module, x = build(package, kind), example(kind)
    v, step = torch.randn_like(x), 1e-6
    wide = copy.deepcopy(module).double()
    ends = [first(wide(x.double() + s * v.double())) for s in (step, -step)]
    got = jvp(lambda x: first(module(x)), (x,), (v,))[1]
    close(got.double(), (ends[0] - ends[1]) / (2 * step))
    close(*(jac(lambda x: first(module(x)).sum(0))(x) for jac in (jacfwd, jacrev)))


@item(AUTOGRAD, "`torch.func.grad`, `functional_call`")
def functional(package, kind):
    module, x = build(package, kind), example(kind)
    got = grad(lambda w: loss_of(lambda x: functional_call(module, w, (x,)), x))(weights_of(module))
    close(tuple(got.values()), gradients(module, x))


@item(AUTOGRAD, "`vmap` over inputs", note=SLOWER)
def vmap_inputs(package, kind):
    module, xs = build(package, kind), torch.stack([example(kind) for _ in range(4)])
    close(vmap(lambda x: first(module(x)))(xs), torch.stack([first(module(x)) for x in xs]))


@item(AUTOGRAD, "`vmap` of `grad`: gradients per sample", note=SLOWER)
def vmap_samples(package, kind):
    module, xs = build(package, kind), torch.stack([example(kind) for _ in range(4)])

    def loss(weights, x):
        return loss_of(lambda x: functional_call(module, weights, (x,)), x)

    got = vmap(grad(loss), (None, 0))(weights_of(module), xs)
    for k, x in enumerate(xs):
        close(tuple(g[k] for g in got.values()), gradients(module, x))


@item(AUTOGRAD, "`vmap` over stacked models (ensembles)", note=SLOWER)
def vmap_models(package, kind):
    models, x = [build(package, kind) for _ in range(3)], example(kind)
    for model in models:
        for p in model.parameters():
            nn.init.normal_(p, std=0.3)
    stacked, _ = stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")
    got = vmap(lambda weights: first(functional_call(base, weights, (x,))))(stacked)
    close(got, torch.stack([first(model(x)) for model in models]))


@item(
    AUTOGRAD,
    "expanded weights (`call_for_per_sample_grads`)",
    ("GRU", "RNN"),
    SLOWER + "; the LSTM in neither",
)
def expanded_weights(package, kind):
    from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

    module, x = build(package, kind, 5, 7, batch_first=True), torch.randn(3, 4, 5)
    first(call_for_per_sample_grads(module, batch_size=3)(x)).square().sum().backward()
    for k, one in enumerate(x.split(1)):
        want = torch.autograd.grad(first(module(one)).square().sum(), list(module.parameters()))
        close(tuple(p.grad_sample[k] for p in module.parameters()), want)


@item(AUTOGRAD, "`torch.utils.checkpoint`, both kinds")
def checkpoints(package, kind):
    from torch.utils.checkpoint import checkpoint

    module, x = build(package, kind), example(kind, requires_grad=True)
    for reentrant in (False, True):
        y = first(checkpoint(module, x, use_reentrant=reentrant))
        got = torch.autograd.grad(y.sum(), x) if not reentrant else None
        if got is None:
            x.grad = None
            y.sum().backward()
            got = (x.grad,)
        close(got, torch.autograd.grad(first(module(x)).sum(), x))


@item(AUTOGRAD, "backward in eval mode")
def backward_in_eval(package, kind):
    module, x = build(package, kind), example(kind)
    want = gradients(module, x)
    close(gradients(module.eval(), x), want)


@item(AUTOGRAD, "freezing any subset of the weights")
def freezing(package, kind):
    module, x = build(package, kind), example(kind)
    weights = list(module.parameters())
    want = gradients(module, x)
    for subset in range(1, 2 ** len(weights)):
        for k, p in enumerate(weights):
            p.requires_grad_(bool(subset >> k & 1))
            p.grad = None
        loss_of(module, x).backward()
        for p, g in zip(weights, want, strict=True):
            assert (p.grad is not None) == p.requires_grad
            if p.requires_grad:
                close(p.grad, g)


@item(AUTOGRAD, "hooks: forward, backward, of tensors and of gradients accumulated")
def hooks(package, kind):
    module, x, seen = build(package, kind), example(kind, requires_grad=True), []
    module.register_forward_pre_hook(lambda m, a: seen.append("pre"))
    module.register_forward_hook(lambda m, a, o: seen.append("forward"))
    module.register_full_backward_hook(lambda m, i, o: seen.append("backward"))
    weight = next(module.parameters())
    weight.register_hook(lambda g: seen.append("tensor"))
    weight.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    first(module(x)).sum().backward()
    assert seen[:2] == ["pre", "forward"]
    assert sorted(seen[2:]) == ["accumulated", "backward", "tensor"]


@item(AUTOGRAD, "anomaly mode names the NaN")
def anomaly(package, kind):
    module, x = build(package, kind), example(kind)
    with torch.no_grad():
        getattr(module, weight(kind))[0, 0] = float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autograd.detect_anomaly(), pytest.raises(RuntimeError, match="returned nan"):
            first(module(x)).sum().backward()  # of ones: the first NaN is the module's
