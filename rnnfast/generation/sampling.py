"""generate(): sampling from a recurrent language model."""

from __future__ import annotations

import math
import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._native import _C
from ..stack import ops
from .model import LanguageModel

__all__ = ["Generated", "generate"]


class Generated(NamedTuple):
    """What :func:`generate` returns."""

    #: ``[B, steps]`` int64. After ``stop`` a row has only stops.
    tokens: Tensor
    #: ``[B]`` int64: the number of tokens of each row, with its ``stop``.
    lengths: Tensor
    #: ``[B]`` float64: the logarithm of the model's probability of each row's tokens, given the prompt.
    #: It is that of the whole softmax at temperature 1, whatever ``temperature``, ``top_k`` and
    #: ``top_p`` are.
    log_probs: Tensor
    #: The states after all tokens but the last. To go on after one step or more, call again with
    #: ``prompt=tokens[:, -1:]`` and this state. A row that has ended keeps the state from which it
    #: chose ``stop``.
    state: Any


class _Sampling(NamedTuple):
    temperature: float
    top_k: int  # 0: all
    top_p: float
    stop: int  # -1: none


def generate(
    embedding: nn.Embedding | None,
    rnn: nn.RNNBase,
    head: nn.Linear,
    prompt: Tensor,
    *,
    steps: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: int | None = None,
    generator: torch.Generator | None = None,
    state: Any = None,
) -> Generated:
    """Sample from a language model: embedding, recurrent layers, head, softmax, draw, and again.

    The whole loop runs in native code without the interpreter's lock. It packs the weights once. Each
    token is drawn by inverting the cumulative distribution at one number of ``torch.rand``. So a seed
    gives the same tokens with any number of threads, and each row is what it would be in another batch
    with the same random numbers. No gradients are recorded.

    A model that the native loop does not take runs in a Python loop with the same meaning, and a
    warning says why: modules of torch.nn (see :func:`rnnfast.accelerate`), other devices than the CPU,
    autocast, dropout in training, hooks, and embeddings or heads of other classes.

    Args:
        embedding: turns tokens into the inputs of ``rnn``; None means one-hot inputs.
        rnn: an LSTM, GRU or RNN of one direction, with any number of layers.
        head: turns outputs of ``rnn`` into the scores (logits) of V tokens.
        prompt: ``[B, P]`` int64, P >= 1: the tokens that each row begins with. They are not returned.
        steps: the most tokens of a row.
        temperature: scores are divided by it. 0, and numbers too small to divide by, take the likeliest
            token, the first of equal ones.
        top_k: draw only from the k likeliest tokens, and those as likely as the last of them.
        top_p: draw only from the likeliest tokens whose probabilities first reach p (nucleus sampling,
            Holtzman et al. 2020, arXiv 1904.09751), after ``top_k``, and those as likely as the last.
        stop: the token that ends a row.
        generator: of the random numbers; None means torch's default generator.
        state: the states before the prompt, as for ``rnn``; None means zeros.

    Raises:
        ValueError: an argument is out of range, or the sizes of the modules do not fit.
        TypeError: a module or the prompt is of another kind, or a count is not an integer.
        IndexError: the prompt has a token that is not in ``range(V)``.
        RuntimeError: the scores contain NaN or infinity, or all are -infinity; torch's own errors.

    """
    model = LanguageModel(embedding, rnn, head)
    model.check(prompt, steps, stop)
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; expected a number of at least 0")
    if top_k is not None and operator.index(top_k) < 1:
        raise ValueError(f"top_k is {top_k}; expected at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; expected above 0 and at most 1")
    sampling = _Sampling(
        float(temperature),
        0 if top_k is None else min(top_k, model.classes),
        1.0 if top_p is None else float(top_p),
        -1 if stop is None else stop,
    )
    batch = len(prompt)
    if temperature > 0:
        device = "cpu" if generator is None else generator.device
        uniforms = torch.rand(
            steps, batch, dtype=torch.float64, generator=generator, device=device
        ).cpu()
    else:
        uniforms = torch.zeros(steps, batch, dtype=torch.float64, device="cpu")
    with torch.no_grad():
        y, state = model.read(prompt, state)
        if model.runs_natively("generate"):
            return _generate_natively(model, y, state, sampling, uniforms)
        return _generate_in_python(model, y, state, sampling, uniforms)


def _generate_natively(
    model: LanguageModel, y: Tensor, state: Any, sampling: _Sampling, uniforms: Tensor
) -> Generated:
    steps, batch = uniforms.shape
    y, h, c = model.states(y, state)
    tokens = torch.empty(batch, steps, dtype=torch.int64, device="cpu")
    lengths = torch.zeros(batch, dtype=torch.int64, device="cpu")
    log_probs = torch.zeros(batch, dtype=torch.float64, device="cpu")
    stack, threads = ops.stack_of(model.rnn._config()), torch.get_num_threads()
    outputs = (tokens, lengths, log_probs)
    _C.generate(stack, threads, model.tensors(), (y, h, c), tuple(sampling), uniforms, outputs)
    return Generated(*outputs, h if c is None else (h, c))


def _generate_in_python(
    model: LanguageModel, y: Tensor, state: Any, sampling: _Sampling, uniforms: Tensor
) -> Generated:
    """The loop of csrc/core/generate.cpp with the modules themselves."""
    steps, batch = uniforms.shape
    tokens = torch.full((batch, steps), sampling.stop, dtype=torch.int64, device="cpu")
    lengths = torch.full((batch,), steps, dtype=torch.int64, device="cpu")
    log_probs = torch.zeros(batch, dtype=torch.float64, device="cpu")
    runs = torch.ones(batch, dtype=torch.bool, device="cpu")
    # Of the native loop, which computes float16 and bfloat16 in float32.
    number = torch.finfo(torch.promote_types(y.dtype, torch.float32))
    for t in range(steps):
        scores = model.scores(y, runs, t)
        chosen = _draw(scores, sampling, uniforms[t], number)
        tokens[runs, t] = chosen[runs]
        log_prob = scores.log_softmax(-1).gather(-1, chosen[:, None]).squeeze(-1)
        log_probs += torch.where(runs, log_prob, 0)
        lengths[runs & (chosen == sampling.stop)] = t + 1
        runs = runs & (chosen != sampling.stop)
        if t + 1 == steps or not runs.any():
            break
        y, new = model.step(chosen.to(y.device), state)
        state = _where(runs.to(y.device), new, state)
    device = y.device
    return Generated(tokens.to(device), lengths.to(device), log_probs.to(device), state)


def _draw(scores: Tensor, sampling: _Sampling, uniform: Tensor, number: torch.finfo) -> Tensor:
    """A token for each row of ``scores`` [B, V]."""
    scale = math.inf if sampling.temperature == 0 else 1 / sampling.temperature
    if scale > number.max:
        return scores.argmax(-1)
    # At a scale of 0, the score -infinity of an impossible token would become NaN.
    weights = ((scores - scores.amax(-1, keepdim=True)) * max(scale, number.tiny)).exp()
    # The scores decide: at a high temperature different scores have the same weight.
    if 0 < sampling.top_k < scores.size(-1):
        least = scores.topk(sampling.top_k).values[:, -1:]
        weights = torch.where(scores >= least, weights, 0)
    if sampling.top_p < 1:
        running = weights.sort(descending=True).values.cumsum(-1)
        reaches = running >= sampling.top_p * running[:, -1:]
        last = reaches.to(torch.int8).argmax(-1, keepdim=True)
        least = scores.sort(descending=True).values.gather(-1, last)
        weights = torch.where(scores >= least, weights, 0)
    running = weights.cumsum(-1)
    return (running > uniform[:, None] * running[:, -1:]).to(torch.int8).argmax(-1)


def _where(runs: Tensor, new: Any, old: Any) -> Any:
    """States ``[L, B, H]``, new for the rows that run."""
    if isinstance(new, tuple):
        return tuple(_where(runs, n, o) for n, o in zip(new, old, strict=True))
    return torch.where(runs[:, None], new, old)
