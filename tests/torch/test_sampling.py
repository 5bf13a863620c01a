"""Which tokens rnnfast.generate draws: temperatures, top_k, top_p, ties and rounding."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn

import rnnfast
from language_models import in_python, model_of, natively, prompt_of, same
from rnnfast.generation import sampling
from rnnfast.generation.model import LanguageModel


def test_frequencies_are_the_probabilities():
    model, prompt = model_of("gru", classes=9, dtype=torch.float32), prompt_of(1, 2, 9)
    with torch.no_grad():
        y, _ = model[1](model[0](prompt).transpose(0, 1))
        probabilities = (model[2](y[-1]) / 0.7).softmax(-1)[0]
    tokens = natively(
        rnnfast.generate, *model, prompt.expand(20000, 2), steps=1, temperature=0.7
    ).tokens
    counts = tokens.flatten().bincount(minlength=9)
    deviation = (20000 * probabilities * (1 - probabilities)).sqrt() + 1
    assert ((counts - 20000 * probabilities).abs() < 4.5 * deviation).all()


def test_weights_of_other_strides():
    embedding, rnn, head = model_of()
    options = {"steps": 7, "temperature": 0}
    want = natively(rnnfast.generate, embedding, rnn, head, prompt := prompt_of(), **options)
    for weight in (embedding.weight, head.weight, rnn.weight_hh_l0):
        weight.data = weight.data.t().contiguous().t()
    same(natively(rnnfast.generate, embedding, rnn, head, prompt, **options), want)


def test_impossible_tokens_are_never_drawn():
    embedding, rnn, head = model_of(classes=40)
    with torch.no_grad():
        head.bias[5:] = -math.inf
    found = natively(rnnfast.generate, embedding, rnn, head, prompt_of(30), steps=30, temperature=3)
    assert found.tokens.max() < 5
    assert found.log_probs.isfinite().all()


@pytest.mark.numerics(dtype="float32")
def test_no_rounding_draws_an_impossible_token():
    """The sum of a block of weights rounds otherwise than the sum of its numbers, one by one."""
    embedding, rnn, head = model_of("gru", classes=256, hidden=4, dtype=torch.float32)
    model = LanguageModel(embedding, rnn, head)
    with torch.no_grad():
        head.weight.zero_()
        for seed in range(10):
            torch.manual_seed(seed)
            head.bias.normal_()
            head.bias[64:] = -math.inf
            head.bias[200] = 0
            weights = (head.bias.double() - head.bias.max()).exp()
            border = (weights[:64].sum() / weights.sum()).item()
            uniforms = border + torch.linspace(-1e-6, 1e-6, 4000, dtype=torch.float64)
            y, state = model.read(torch.zeros(4000, 1, dtype=torch.int64), None)
            options = sampling._Sampling(1.0, 0, 1.0, -1)
            found = sampling._generate_natively(model, y, state, options, uniforms[None])
            assert ((found.tokens < 64) | (found.tokens == 200)).all()
            assert found.log_probs.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1e-320, 1e-310, 1e-40, 1e-30, 1e40, 1e300])
def test_extreme_temperatures(temperature, dtype):
    model, prompt = model_of("gru", dtype=dtype), prompt_of(200)
    greedy = rnnfast.generate(*model, prompt, steps=1, temperature=0)
    found = natively(rnnfast.generate, *model, prompt, steps=1, temperature=temperature)
    if temperature < 1:
        assert found.tokens.equal(greedy.tokens)
    else:
        assert len(found.tokens.unique()) > 15  # nearly uniform over 23


@pytest.mark.parametrize("loop", ["native", "python"])
@pytest.mark.parametrize("temperature", [1e9, 1e300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_high_temperature_does_not_mix_the_likeliest_with_others(
    temperature, dtype, loop, monkeypatch
):
    """All tokens have the same weight then, and still only the likeliest stay."""
    embedding, rnn, head = model_of("gru", classes=1000, dtype=dtype)
    nn.init.zeros_(head.weight)
    nn.init.normal_(head.bias, std=3)
    best = head.bias.argsort(descending=True)
    prompt = torch.zeros(300, 1, dtype=torch.int64)
    run = natively if loop == "native" else partial(in_python, monkeypatch)
    for options, count in (({"top_k": 1}, 1), ({"top_k": 7}, 7), ({"top_k": 70, "top_p": 0.1}, 7)):
        found = run(
            *(rnnfast.generate, embedding, rnn, head, prompt),
            **options,
            steps=1,
            temperature=temperature,
        )
        assert found.tokens.unique().tolist() == sorted(best[:count].tolist())


@pytest.mark.parametrize("temperature", [0, 1e-320, 1e-310, 1e-39])
def test_the_first_of_equal_tokens(temperature, monkeypatch):
    embedding, rnn, head = model_of("gru", dtype=torch.float32)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    with torch.no_grad():
        head.bias[[5, 9, 11]] = 2
    options = {"steps": 1, "temperature": temperature}
    found = natively(rnnfast.generate, embedding, rnn, head, prompt_of(50), **options)
    assert (found.tokens == 5).all()
    found = in_python(monkeypatch, rnnfast.generate, embedding, rnn, head, prompt_of(50), **options)
    assert (found.tokens == 5).all()


@pytest.mark.parametrize("top_p", [0.5, 1 - 1e-7])
def test_the_whole_distribution_of_many_equal_tokens_is_drawn(top_p):
    """A sum of a quarter of a million float32 numbers, one by one, is too small by half a percent."""
    count = 1 << 18
    embedding, rnn, head = model_of("gru", classes=count, hidden=2, dtype=torch.float32)
    nn.init.zeros_(head.weight)
    nn.init.uniform_(head.bias, 0, 1e-3)
    head.bias.data = head.bias.data.sort(descending=True).values
    model = LanguageModel(embedding, rnn, head)
    y, state = model.read(torch.zeros(1, 1, dtype=torch.int64), None)
    uniforms = torch.tensor([[1 - 1e-6]], dtype=torch.float64)
    found = sampling._generate_natively(model, y, state, sampling._Sampling(1, 0, top_p, -1), uniforms)
    sums = head.bias.double().exp().cumsum(0)
    assert found.tokens.item() == pytest.approx(int((sums < top_p * sums[-1]).sum()), rel=1e-4)
