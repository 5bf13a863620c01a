"""The loops over tokens of the extension by themselves: they check all that they are given."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

import rnnfast
from language_models import in_python, model_of, natively, prompt_of, same
from misfits import misfits
from rnnfast import _C
from rnnfast.generation.model import LanguageModel
from rnnfast.stack import ops
from rnnfast.stack.config import CELLS

B, STEPS, BEAMS, H, V = 3, 4, 2, 19, 23
SAMPLING = (1.0, 0, 1.0, -1)


class Call:
    """A small LSTM of two layers, and what both loops write."""

    def __init__(self):
        self.model = LanguageModel(*model_of(classes=V, hidden=H))
        weights, *others = self.model.tensors()
        self.weights = [f"weight {number}" for number in range(len(weights))]
        self.tensors = dict(zip(self.weights, weights, strict=True))
        self.tensors |= dict(zip(("embedding", "head_w", "head_b"), others, strict=True))
        self.tensors |= {name: torch.randn(2, B, H).double() for name in ("h", "c")}
        self.tensors |= {"y": torch.randn(B, H).double(), "uniforms": torch.rand(STEPS, B).double()}
        self.tensors |= {
            "tokens": torch.zeros(B, STEPS).long(),
            "lengths": torch.zeros(B).long(),
            "log_probs": torch.zeros(B).double(),
            "hypotheses": torch.zeros(B, BEAMS, STEPS).long(),
            "their lengths": torch.zeros(B, BEAMS).long(),
            "scores": torch.zeros(B, BEAMS).double(),
        }
        self.stack = ops.stack_of(self.model.rnn._config())

    def of(self, *names):
        return tuple(self.tensors[name] for name in names)

    def bundles(self):
        return (list(self.of(*self.weights)), *self.of("embedding", "head_w", "head_b")), self.of(
            "y", "h", "c"
        )

    def generate(self, sampling=SAMPLING):
        outputs = self.of("tokens", "lengths", "log_probs")
        _C.generate(self.stack, 1, *self.bundles(), sampling, self.tensors["uniforms"], outputs)

    def beam_search(self, beams=BEAMS):
        outputs = self.of("hypotheses", "their lengths", "scores")
        _C.beam_search(self.stack, 1, *self.bundles(), (beams, 1, 1.0), outputs)


SAMPLED = ["uniforms", "tokens", "lengths", "log_probs"]
SEARCHED = ["hypotheses", "their lengths", "scores"]
BOTH = ["y", "h", "c", "embedding", "head_w", "head_b", "weight 0", "weight 5", "weight 7"]


@pytest.mark.parametrize("name", [*SAMPLED, *SEARCHED, *BOTH])
def test_a_tensor_that_does_not_fit(name):
    call = Call()
    call.generate()
    call.beam_search()
    right = call.tensors[name]
    for what, wrong in misfits(right, dense=name in (*SAMPLED, *SEARCHED)):
        if (name, what[3:]) == ("hypotheses", "in dimension 2"):
            continue  # it is what says how many steps there are
        call.tensors[name] = wrong
        for run in [call.generate] * (name not in SEARCHED) + [call.beam_search] * (
            name not in SAMPLED
        ):
            with pytest.raises((ValueError, TypeError)):
                run()
    call.tensors[name] = right
    call.generate()


@pytest.mark.parametrize("name", ["y", "h", "head_w", "weight 0"])
def test_a_tensor_that_must_be_there(name):
    call = Call()
    call.tensors[name] = None
    for run in (call.generate, call.beam_search):
        with pytest.raises(TypeError, match="must not be None"):
            run()


@pytest.mark.parametrize(
    "sampling",
    [
        (-1.0, 0, 1.0, -1),
        (math.nan, 0, 1.0, -1),
        (math.inf, 0, 1.0, -1),
        (1.0, -1, 1.0, -1),
        (1.0, 0, 0.0, -1),
        (1.0, 0, math.nan, -1),
    ],
    ids=str,
)
def test_numbers_that_make_no_sense(sampling):
    with pytest.raises(ValueError, match=r"temperature|top_k"):
        Call().generate(sampling)


@pytest.mark.parametrize("beams", [0, -1])
def test_no_beams(beams):
    with pytest.raises(ValueError, match=f"beams is {beams}; expected at least 1"):
        Call().beam_search(beams)


@pytest.mark.parametrize("options", [{"reverse": True, "layers": 2}, {"directions": 2}], ids=str)
def test_only_stacks_that_run_forward_in_time(options):
    call = Call()
    call.stack = _C.Stack(cell=CELLS["lstm"].number, **options)
    for run in (call.generate, call.beam_search):
        with pytest.raises(ValueError, match="has one direction, forward in time"):
            run()


def test_rows_with_gaps():
    """Of the model and of the states; only the features of a row lie side by side."""
    call = Call()
    other = {name: t.clone() for name, t in call.tensors.items()}
    call.generate()
    found = call.tensors
    for gap, (name, t) in enumerate(other.items()):
        if t.dim() > 1 and t.dtype == torch.float64 and name not in (*SAMPLED, *SEARCHED):
            wide = t.new_full((*t.shape[:-2], 2 * t.shape[-2], t.shape[-1] + gap), math.nan)
            other[name] = wide[..., ::2, : t.shape[-1]].copy_(t)
    call.tensors = other
    call.generate()
    for name in ("tokens", "log_probs", "h", "c"):
        assert torch.equal(other[name], found[name]), name


def test_a_dimension_of_one_may_have_any_stride():
    call = Call()
    for name in ("y", "h", "c", "uniforms"):
        dim = 1 if name in ("h", "c", "uniforms") else 0
        call.tensors[name] = call.tensors[name].narrow(dim, 0, 1).contiguous()
    call.tensors["tokens"] = torch.empty_strided((1, STEPS), (99, 1), dtype=torch.int64)
    call.tensors["lengths"] = torch.ones(1).long()
    call.tensors["log_probs"] = torch.full((1,), 1e6).double()
    call.generate()
    assert call.tensors["log_probs"] < 0
    assert call.tensors["lengths"].tolist() == [STEPS]


def drawn(bias, uniforms, sampling=SAMPLING):
    """The tokens of equal rows, one for each uniform number, by a model whose scores are its bias."""
    model = LanguageModel(*model_of(classes=len(bias)))
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(bias)
    rows = len(uniforms)
    state = tuple(torch.zeros(shape).double() for shape in ((rows, H), (2, rows, H), (2, rows, H)))
    outputs = torch.zeros(rows, 1).long(), torch.zeros(rows).long(), torch.zeros(rows).double()
    stack = ops.stack_of(model.rnn._config())
    _C.generate(stack, 1, model.tensors(), state, sampling, uniforms.double()[None], outputs)
    return outputs[0].flatten().tolist()


def test_where_one_token_ends_and_the_next_begins():
    """A token is drawn by the numbers from its lower bound on, up to its upper bound."""
    assert drawn(torch.zeros(128), torch.arange(128) / 128) == list(range(128))


@pytest.mark.parametrize("possible", [3, 40, 130])
def test_the_end_of_all_tokens(possible):
    """No sum of weights exceeds the whole. Blocks of weights that are all zero follow."""
    bias = torch.zeros(300)
    bias[possible:] = -math.inf
    assert drawn(bias, torch.ones(2)) == [possible - 1] * 2


def test_tokens_as_likely_as_the_last_of_top_k_count_for_top_p():
    """Four stay, of 0.71, 0.1, 0.1 and 0.1. Of only two of them the first would reach 0.8."""
    bias = torch.full((V,), -9.0)
    bias[:4] = torch.tensor([3.0, 1.0, 1.0, 1.0])
    assert drawn(bias, torch.tensor([0.1, 0.8, 0.9, 0.99]), (1.0, 2, 0.8, -1)) == [0, 1, 2, 3]


@pytest.mark.parametrize("top_p", [0.5, 0.9, 0.99])
def test_the_likeliest_of_many_tokens(top_p, monkeypatch):
    """More than are sorted at once."""
    model, prompt = model_of(classes=700), prompt_of(9, 2, 700)
    options = {"steps": 12, "top_p": top_p, "temperature": 2.5}
    found, expected = (
        call(rnnfast.generate, *model, prompt, generator=torch.Generator().manual_seed(1), **options)
        for call in (natively, partial(in_python, monkeypatch))
    )
    same(found, expected)


def test_impossible_tokens_are_no_hypotheses(monkeypatch):
    embedding, rnn, head = model_of()
    with torch.no_grad():
        head.bias[:-2] = -math.inf
    options = {"steps": 1, "beams": 4, "stop": 0}
    found = natively(rnnfast.beam_search, embedding, rnn, head, prompt_of(), **options)
    assert found.lengths.tolist() == [[1, 1, 0, 0]] * 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_temperatures_at_the_ends(dtype):
    """A tiny one has no reciprocal: the likeliest token. A huge one draws no impossible token."""
    model = model_of(dtype=dtype)
    tiny = torch.finfo(dtype).tiny / 16
    prompt = prompt_of()
    greedy = natively(rnnfast.generate, *model, prompt, steps=6, temperature=0)
    found = natively(rnnfast.generate, *model, prompt, steps=6, temperature=tiny)
    assert torch.equal(found.tokens, greedy.tokens)
    with torch.no_grad():
        model[2].bias[:-2] = -math.inf
    found = natively(rnnfast.generate, *model, prompt_of(40), steps=6, temperature=1e300)
    assert found.tokens.min() == V - 2
    assert found.tokens.max() == V - 1
