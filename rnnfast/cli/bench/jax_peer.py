"""Recurrent layers in JAX, as users write them: ``lax.scan`` under ``jit``. JAX uses all cores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from rnnfast.cli.bench.measure import TRAIN, Case, Job, Problem


def prepare(case: Case, problem: Problem) -> Job | None:
    """Prepare a case; see rnnfast.cli.bench.peers."""
    if case.packed or case.proj or case.dtype != "float32":
        return None
    weights = {name: jnp.asarray(value.numpy()) for name, value in problem.weights.items()}
    states = [jnp.asarray(state.numpy()) for state in problem.states]
    x, dy = jnp.asarray(problem.x.numpy()), jnp.asarray(problem.dy.numpy())

    def forward(weights: Any, x: Any) -> Any:
        return _stack(case, weights, states, x)

    def train(weights: Any, x: Any, dy: Any) -> Any:
        if case.dx:
            y, pull = jax.vjp(lambda x, w: forward(w, x), x, weights)
        else:
            y, pull = jax.vjp(lambda w: forward(w, x), weights)
        return y, *pull(dy)

    infer_compiled, train_compiled = jax.jit(forward), jax.jit(train)

    def run() -> Sequence[Tensor]:
        if case.mode != TRAIN:
            return [from_dlpack(jax.block_until_ready(infer_compiled(weights, x)))]
        *results, dweights = jax.block_until_ready(train_compiled(weights, x, dy))
        return [from_dlpack(value) for value in (*results, *(dweights[name] for name in weights))]

    return run


def _stack(case: Case, weights: Any, states: Any, x: Any) -> Any:
    number = 0
    for layer in range(case.layers):
        outputs = []
        for end in ("", "_reverse") if case.bidirectional else ("",):
            w_ih, w_hh, b_ih, b_hh = (
                weights[f"{kind}_l{layer}{end}"]
                for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )

            def step(state: Any, a: Any, w: Any = w_hh, b: Any = b_hh) -> Any:
                return _step(case.cell, state, a, state[0] @ w.T + b)

            initial = tuple(s[number] for s in states)
            _, y = lax.scan(step, initial, x @ w_ih.T + b_ih, reverse=bool(end))
            outputs.append(y)
            number += 1
        x = jnp.concatenate(outputs, -1)
    return x


def _step(cell: str, state: Any, a: Any, u: Any) -> Any:
    """One step from the products ``a`` with the input and ``u`` with h; the new state, and h."""
    if cell == "LSTM":
        i, f, g, o = jnp.split(a + u, 4, -1)
        c = jax.nn.sigmoid(f) * state[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h
    if cell == "GRU":
        (a_r, a_z, a_n), (u_r, u_z, u_n) = jnp.split(a, 3, -1), jnp.split(u, 3, -1)
        n = jnp.tanh(a_n + jax.nn.sigmoid(a_r + u_r) * u_n)
        h = n + jax.nn.sigmoid(a_z + u_z) * (state[0] - n)
    else:
        h = jnp.tanh(a + u)
    return (h,), h
