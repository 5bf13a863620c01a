"""beam_search(): the likeliest continuations of a prompt."""

from __future__ import annotations

import math
import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._native import _C
from ..stack import ops
from .model import LanguageModel

__all__ = ["Beams", "beam_search"]


class Beams(NamedTuple):
    """What :func:`beam_search` returns: for each row the best hypotheses, the best first."""

    #: ``[B, beams, steps]`` int64. After ``stop`` a hypothesis has only stops.
    tokens: Tensor
    #: ``[B, beams]`` int64: the number of tokens, with ``stop``. 0: there are fewer hypotheses.
    lengths: Tensor
    #: ``[B, beams]`` float64: the log-probability divided by ``length ** length_penalty``.
    scores: Tensor


class _Search(NamedTuple):
    beams: int
    stop: int
    length_penalty: float


def beam_search(
    embedding: nn.Embedding | None,
    rnn: nn.RNNBase,
    head: nn.Linear,
    prompt: Tensor,
    *,
    steps: int,
    beams: int,
    stop: int,
    length_penalty: float = 1.0,
    state: Any = None,
) -> Beams:
    """Search for the likeliest continuations of a prompt, ``beams`` at a time.

    Each step takes the best ``beams`` continuations of all beams that do not end with ``stop``. A
    continuation that ends with ``stop`` is a hypothesis if it is among the best ``beams`` of all. A row
    is done when it has ``beams`` hypotheses; after the last step the beams themselves are hypotheses.
    The score of a hypothesis is its log-probability divided by ``length ** length_penalty`` (Wu et al.
    2016, arXiv 1609.08144, without their constant).

    Runs as :func:`generate` does: in native code, or with a warning in Python.

    Args:
        embedding: as for :func:`generate`.
        rnn: as for :func:`generate`.
        head: as for :func:`generate`.
        prompt: as for :func:`generate`.
        steps: the most tokens of a hypothesis.
        beams: how many continuations each step keeps, and how many hypotheses are returned.
        stop: the token that ends a hypothesis.
        length_penalty: 0 compares log-probabilities, 1 log-probabilities per token; -10 to 10.
        state: as for :func:`generate`; for an encoder-decoder the final state of the encoder.

    Raises:
        ValueError: as for :func:`generate`.
        TypeError: as for :func:`generate`.
        IndexError: as for :func:`generate`.
        RuntimeError: as for :func:`generate`.

    """
    model = LanguageModel(embedding, rnn, head)
    model.check(prompt, steps, stop)
    if operator.index(beams) < 1:
        raise ValueError(f"beams is {beams}; expected at least 1")
    if not abs(length_penalty) <= 10:  # with a larger one, the power of a length may overflow
        raise ValueError(f"length_penalty is {length_penalty}; expected a number from -10 to 10")
    search = _Search(beams, stop, float(length_penalty))
    with torch.no_grad():
        y, state = model.read(prompt, state)
        if model.runs_natively("beam_search"):
            return _search_natively(model, y, state, search, steps)
        return _search_in_python(model, y, state, search, steps)


def _search_natively(model: LanguageModel, y: Tensor, state: Any, search: _Search, steps: int) -> Beams:
    shape = (len(y), search.beams)
    tokens = torch.empty(*shape, steps, dtype=torch.int64, device="cpu")
    lengths = torch.zeros(shape, dtype=torch.int64, device="cpu")
    scores = torch.zeros(shape, dtype=torch.float64, device="cpu")
    stack, threads = ops.stack_of(model.rnn._config()), torch.get_num_threads()
    states, outputs = model.states(y, state), (tokens, lengths, scores)
    _C.beam_search(stack, threads, model.tensors(), states, tuple(search), outputs)
    return Beams(*outputs)


def _search_in_python(
    model: LanguageModel, y: Tensor, state: Any, search: _Search, steps: int
) -> Beams:
    """The search of csrc/core/beam_search.cpp with the modules themselves."""
    batch, beams = len(y), search.beams
    y = y.repeat_interleave(beams, 0)
    state = _rows(state, torch.arange(batch, device=y.device).repeat_interleave(beams))
    log_probs = torch.full((batch, beams), -math.inf, dtype=torch.float64, device="cpu")
    log_probs[:, :1] = 0  # at first all beams of a row are the same
    live: list[list[list[int]]] = [[[] for _ in range(beams)] for _ in range(batch)]
    ended: list[list[tuple[float, list[int]]]] = [[] for _ in range(batch)]

    def is_done(b: int) -> bool:
        return len(ended[b]) >= beams or not live[b]

    for t in range(steps):
        scores = model.scores(y, log_probs.flatten() > -math.inf, t).view(batch, beams, model.classes)
        continued = log_probs[:, :, None] + scores.log_softmax(-1)
        classes = scores.size(-1)
        # Stable: of equal continuations the earlier beam and the smaller token come first.
        best = continued.flatten(1).sort(descending=True, stable=True)
        parents = torch.arange(batch * beams, device="cpu")
        tokens = torch.zeros(batch * beams, dtype=torch.int64, device="cpu")
        log_probs = torch.full((batch, beams), -math.inf, dtype=torch.float64, device="cpu")
        for b in range(batch):
            if is_done(b):
                continue
            before, live[b] = live[b], []
            for rank, (value, place) in enumerate(
                zip(best[0][b, : 2 * beams].tolist(), best[1][b, : 2 * beams].tolist(), strict=True)
            ):
                beam, token = divmod(place, classes)
                if value == -math.inf:
                    break
                if token != search.stop and len(live[b]) < beams:
                    parents[b * beams + len(live[b])] = b * beams + beam
                    tokens[b * beams + len(live[b])] = token
                    log_probs[b, len(live[b])] = value
                    live[b].append([*before[beam], token])
                elif token == search.stop and rank < beams:
                    ended[b].append((value / (t + 1) ** search.length_penalty, [*before[beam], token]))
        if t + 1 == steps or all(map(is_done, range(batch))):
            break
        y, state = model.step(tokens.to(y.device), _rows(state, parents.to(y.device)))
    for b in range(batch):
        if len(ended[b]) < beams:
            ended[b] += [
                (float(log_probs[b, k]) / len(tokens_) ** search.length_penalty, tokens_)
                for k, tokens_ in enumerate(live[b])
                if tokens_
            ]
    return Beams(*(t.to(y.device) for t in _best(ended, search, steps)))


def _best(ended: list[list[tuple[float, list[int]]]], search: _Search, steps: int) -> Beams:
    """The hypotheses with the highest scores as tensors."""
    shape = (len(ended), search.beams)
    tokens = torch.full((*shape, steps), search.stop, dtype=torch.int64, device="cpu")
    lengths = torch.zeros(shape, dtype=torch.int64, device="cpu")
    scores = torch.full(shape, -math.inf, dtype=torch.float64, device="cpu")
    for b, hypotheses in enumerate(ended):
        hypotheses.sort(key=lambda hypothesis: -hypothesis[0])
        for k, (score, sequence) in enumerate(hypotheses[: search.beams]):
            tokens[b, k, : len(sequence)] = torch.tensor(sequence, device="cpu")
            lengths[b, k], scores[b, k] = len(sequence), score
    return Beams(tokens, lengths, scores)


def _rows(state: Any, rows: Tensor) -> Any:
    """Some rows of states ``[L, B, H]``, in this order."""
    if isinstance(state, tuple):
        return tuple(_rows(s, rows) for s in state)
    return state[:, rows]
