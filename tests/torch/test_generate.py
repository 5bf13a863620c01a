"""rnnfast.generate and rnnfast.beam_search against plain Python loops, and their guarantees."""

from __future__ import annotations

import math
import re
import signal
import threading
import time
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import rnnfast
from cell_modules import every_cell
from language_models import in_python, model_of, natively, prompt_of, same
from rnnfast import _C
from rnnfast.generation import sampling
from rnnfast.generation.model import LanguageModel
from rnnfast.stack import ops
from threads import set_threads

SAMPLINGS = {
    "plain": {},
    "cold": {"temperature": 0.5},
    "hot": {"temperature": 2.0},
    "greedy": {"temperature": 0},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.6},
    "both": {"top_k": 9, "top_p": 0.8, "temperature": 1.3},
}


@pytest.mark.numerics(dtype="float64")
@pytest.mark.parametrize("how", SAMPLINGS)
@every_cell
def test_the_same_tokens_as_a_loop_in_python(cell, how, monkeypatch):
    model, prompt = model_of(cell), prompt_of()
    options = SAMPLINGS[how] | {"steps": 40, "stop": 3}
    for _ in range(2):
        seed = int(torch.randint(1000, ()))
        generator = torch.Generator().manual_seed(seed)
        found = natively(rnnfast.generate, *model, prompt, generator=generator, **options)
        generator = torch.Generator().manual_seed(seed)
        expected = in_python(
            monkeypatch, rnnfast.generate, *model, prompt, generator=generator, **options
        )
        same(found, expected)
    if how == "hot":
        assert (found.lengths < 40).any()


@every_cell
def test_one_hot_inputs(cell, monkeypatch):
    model, prompt = model_of(cell, one_hot=True), prompt_of()
    found = natively(rnnfast.generate, *model, prompt, steps=20, temperature=0)
    same(found, in_python(monkeypatch, rnnfast.generate, *model, prompt, steps=20, temperature=0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_narrow_numbers(dtype, monkeypatch):
    dtype = getattr(torch, dtype)
    model, prompt = model_of(dtype=dtype, hidden=40), prompt_of(batch=40)
    found = natively(rnnfast.generate, *model, prompt, steps=1)
    assert found.state[0].dtype == dtype
    scores = model[2].double()(model[1].double()(model[0].double()(prompt).transpose(0, 1))[0][-1])
    log_probs = scores.log_softmax(-1).gather(-1, found.tokens).squeeze(-1)
    tolerance = 1e-5 if dtype == torch.float32 else 0.2
    torch.testing.assert_close(found.log_probs, log_probs, atol=tolerance, rtol=0)


@pytest.mark.numerics(dtype="bfloat16")
@pytest.mark.parametrize(
    ("batch", "classes", "hidden"), [(1, 1, 8), (3, 16, 33), (37, 100, 64), (5, 517, 17)]
)
def test_scores_of_bfloat16(batch, classes, hidden):
    """The head's product, which is in float32, against float64."""
    model = model_of("gru", classes, hidden, 1, torch.bfloat16)
    y = torch.randn(batch, hidden, dtype=torch.bfloat16)
    scores = model[2].double()(y.double())
    model[2].bfloat16()
    state = (y, torch.zeros(1, batch, hidden, dtype=torch.bfloat16))
    options = sampling._Sampling(0.0, 0, 1.0, -1)
    with torch.no_grad():
        found = sampling._generate_natively(
            LanguageModel(*model), *state, options, torch.zeros(1, batch, dtype=torch.float64)
        )
    # A row's log-probability is exact to the rounding of float32.
    best = scores.gather(-1, found.tokens).squeeze(-1)
    assert (scores.amax(-1) - best).max() < 1e-4
    torch.testing.assert_close(found.log_probs, best - scores.logsumexp(-1), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("classes", [23, 9000])
@pytest.mark.parametrize("options", [{}, {"top_k": 30}, {"top_p": 0.9}], ids=str)
def test_threads_and_batches_do_not_matter(classes, options):
    model = model_of("lstm", classes, 40, dtype=torch.float32)
    prompt = prompt_of(17, 2, classes)
    uniforms = torch.rand(12, 17, dtype=torch.float64)
    options = sampling._Sampling(1.0, options.get("top_k", 0), options.get("top_p", 1.0), 5)

    def run(rows):
        with torch.no_grad():
            y, state = LanguageModel(*model).read(prompt[rows], None)
            return sampling._generate_natively(
                LanguageModel(*model), y, state, options, uniforms[:, rows].contiguous()
            )

    whole = run(slice(None))
    set_threads(3)
    same(run(slice(None)), whole, atol=0)
    alone = run(slice(4, 5))
    same(alone[:3], [t[4:5] for t in whole[:3]], atol=0)
    same(alone.state, [s[:, 4:5] for s in whole.state], atol=0)


def test_it_goes_on_where_it_stopped():
    model, prompt = model_of(), prompt_of()
    whole = rnnfast.generate(*model, prompt, steps=15, temperature=0)
    first = rnnfast.generate(*model, prompt, steps=6, temperature=0)
    second = rnnfast.generate(*model, first.tokens[:, -1:], steps=9, temperature=0, state=first.state)
    assert torch.cat([first.tokens, second.tokens], 1).equal(whole.tokens)
    same(second.state, whole.state, atol=0)
    assert not any(h.requires_grad for h in whole.state)


def test_every_row_may_stop_at_once():
    embedding, rnn, head = model_of(classes=6)
    with torch.no_grad():
        head.bias[2] = 100
    found = natively(rnnfast.generate, embedding, rnn, head, prompt_of(4, 1, 6), steps=9, stop=2)
    assert found.lengths.tolist() == [1] * 4
    assert (found.tokens == 2).all()


@pytest.mark.parametrize("batch_first", [False, True])
def test_layouts_and_a_given_state(batch_first, monkeypatch):
    model, prompt = model_of("gru", batch_first=batch_first), prompt_of()
    state = torch.randn(5, 2, 19, dtype=torch.float64).transpose(0, 1)  # not contiguous
    options = {"steps": 8, "temperature": 0, "state": state}
    found = natively(rnnfast.generate, *model, prompt.t().contiguous().t(), **options)
    same(found, in_python(monkeypatch, rnnfast.generate, *model, prompt, **options))


@pytest.mark.parametrize(("batch", "steps"), [(0, 4), (3, 0), (0, 0)])
def test_nothing_to_do(batch, steps, monkeypatch):
    found = natively(rnnfast.generate, *model_of(), prompt_of(batch), steps=steps)
    assert found.tokens.shape == (batch, steps)
    assert found.state[0].shape == (2, batch, 19)
    search = natively(rnnfast.beam_search, *model_of(), prompt_of(batch), steps=steps, beams=3, stop=0)
    assert search.tokens.shape == (batch, 3, steps)
    options = {"steps": steps, "beams": 3, "stop": 0}
    same(search, in_python(monkeypatch, rnnfast.beam_search, *model_of(), prompt_of(batch), **options))


def test_weights_and_states_stay():
    model, prompt = model_of(), prompt_of()
    state = tuple(torch.randn(2, 5, 19, dtype=torch.float64) for _ in range(2))
    before = [t.clone() for t in (*state, *model[1].parameters())]
    rnnfast.generate(*model, prompt, steps=5, state=state)
    rnnfast.beam_search(*model, prompt, steps=5, beams=2, stop=0, state=state)
    assert all(a.equal(b) for a, b in zip(before, (*state, *model[1].parameters()), strict=True))


def test_ties_have_an_order(monkeypatch):
    embedding, rnn, head = model_of()
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    model, prompt = (embedding, rnn, head), prompt_of(2)
    options = {"steps": 3, "beams": 3, "stop": 1}
    found = natively(rnnfast.beam_search, *model, prompt, **options)
    same(found, in_python(monkeypatch, rnnfast.beam_search, *model, prompt, **options))


def test_a_search_without_living_beams_ends(monkeypatch):
    model, prompt = model_of("gru", classes=1), torch.zeros(2, 1, dtype=torch.int64)
    options = {"steps": 100_000, "beams": 3, "stop": 0}
    found = natively(rnnfast.beam_search, *model, prompt, **options)
    assert found.lengths.tolist() == [[1, 0, 0]] * 2
    same(found, in_python(monkeypatch, rnnfast.beam_search, *model, prompt, **options))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("search", [False, True])
def test_scores_that_are_not_numbers(value, search, monkeypatch):
    embedding, rnn, head = model_of()
    with torch.no_grad():
        head.bias[7] = value
    model, prompt = (embedding, rnn, head), prompt_of()
    call = (rnnfast.beam_search, *model, prompt) if search else (rnnfast.generate, *model, prompt)
    options = {"steps": 3} | ({"beams": 2, "stop": 0} if search else {})
    with pytest.raises(RuntimeError, match="contain NaN or inf"):
        natively(*call, **options)
    with pytest.raises(RuntimeError, match="contain NaN or inf"):
        in_python(monkeypatch, *call, **options)


# --- beam search --------------------------------------------------------------------------------


@pytest.mark.numerics(dtype="float64")
@pytest.mark.parametrize("penalty", [0.0, 1.0, 0.6])
@pytest.mark.parametrize("count", [1, 4, 30])
@every_cell
def test_the_same_beams_as_in_python(cell, count, penalty, monkeypatch):
    model, prompt = model_of(cell), prompt_of(4)
    with torch.no_grad():
        model[-1].bias[1] += 2  # some hypotheses end
    options = {"steps": 9, "beams": count, "stop": 1, "length_penalty": penalty}
    found = natively(rnnfast.beam_search, *model, prompt, **options)
    same(found, in_python(monkeypatch, rnnfast.beam_search, *model, prompt, **options))
    if count == 4:
        assert (found.lengths < 9).any()
        assert (found.scores.diff() <= 0).all()


def test_a_wide_search_finds_the_best_of_all_sequences():
    classes, steps, stop = 4, 4, 0
    model, prompt = model_of("gru", classes, 12), prompt_of(3, 2, classes)
    found = rnnfast.beam_search(*model, prompt, steps=steps, beams=200, stop=stop, length_penalty=0)
    for b in range(3):
        best = max(log_probs_of_all(model, prompt[b : b + 1], steps, stop))
        assert found.scores[b, 0].item() == pytest.approx(best, abs=1e-9)


def log_probs_of_all(model, prompt, steps, stop, state=None, before=0.0):
    """The log-probability of every sequence that ends with ``stop`` or has ``steps`` tokens."""
    embedding, rnn, head = model
    with torch.no_grad():
        y, state = rnn(embedding(prompt).transpose(0, 1), state)
        log_probs = (before + head(y[-1]).log_softmax(-1))[0].tolist()
    for token, log_prob in enumerate(log_probs):
        if token == stop or steps == 1:
            yield log_prob
        else:
            yield from log_probs_of_all(
                model, torch.tensor([[token]]), steps - 1, stop, state, log_prob
            )


def test_one_beam_is_greedy():
    model, prompt = model_of("lstm"), prompt_of(6)
    greedy = rnnfast.generate(*model, prompt, steps=10, temperature=0, stop=2)
    found = rnnfast.beam_search(*model, prompt, steps=10, beams=1, stop=2, length_penalty=0)
    assert found.tokens[:, 0].equal(greedy.tokens)
    torch.testing.assert_close(found.scores[:, 0], greedy.log_probs)


def test_a_search_goes_on_from_a_state(monkeypatch):
    """It finds what a search with the whole prompt finds."""
    model, prompt = model_of("lstm"), prompt_of(4, 5)
    with torch.no_grad():
        _, state = model[1](model[0](prompt[:, :-2]).transpose(0, 1))
    options = {"steps": 6, "beams": 3, "stop": 0}
    want = natively(rnnfast.beam_search, *model, prompt, **options)
    rest, options = prompt[:, -2:], options | {"state": state}
    same(natively(rnnfast.beam_search, *model, rest, **options), want)
    same(in_python(monkeypatch, rnnfast.beam_search, *model, rest, **options), want)


def test_threads_do_not_matter_to_beams():
    model, prompt = model_of("lstm", 3000, 40, dtype=torch.float32), prompt_of(9, 2, 3000)
    options = {"steps": 8, "beams": 5, "stop": 0}
    found = rnnfast.beam_search(*model, prompt, **options)
    set_threads(3)
    same(rnnfast.beam_search(*model, prompt, **options), found, atol=0)


# --- where Python runs the loop, and errors -----------------------------------------------------


def test_what_the_native_loop_does_not_take():
    embedding, rnn, head = model_of()
    prompt = prompt_of()
    expected = rnnfast.generate(embedding, rnn, head, prompt, steps=7, temperature=0)

    def check(reason, embedding=embedding, rnn=rnn, head=head):
        with pytest.warns(UserWarning, match=reason):
            found = rnnfast.generate(embedding, rnn, head, prompt, steps=7, temperature=0)
        same(found, expected)

    torch_rnn = nn.LSTM(11, 19, 2, dtype=torch.float64)
    torch_rnn.load_state_dict(rnn.state_dict())
    check("rnn is a torch.nn.modules.rnn.LSTM", rnn=torch_rnn)

    class Head(nn.Linear):
        pass

    other = Head(19, 23, dtype=torch.float64)
    other.load_state_dict(head.state_dict())
    check("head is a .*Head, not", head=other)

    class Own(rnnfast.LSTM):
        def forward(self, x, hx=None):
            return super().forward(x, hx)

    own = Own(11, 19, 2, dtype=torch.float64)
    own.load_state_dict(rnn.state_dict())
    check("rnn is a .*Own", rnn=own)

    class Table(nn.Embedding):
        pass

    for table in (Table(23, 11).double(), nn.Embedding(23, 11, max_norm=1e3).double()):
        table.load_state_dict(embedding.state_dict())
        check("not a plain torch.nn.Embedding", embedding=table)
    hooks = nn.modules.module
    for register in (
        rnn.register_forward_hook,
        embedding.register_forward_pre_hook,
        hooks.register_module_forward_hook,
        hooks.register_module_forward_pre_hook,
    ):
        handle = register(lambda *_: None)
        check("a module has hooks")
        handle.remove()
    with torch.autocast("cpu", torch.bfloat16):  # which does not touch float64
        check("autocast")
    head.forward = lambda y: nn.functional.linear(y, head.weight, head.bias)
    check("forward of a module was replaced")
    del head.forward
    nn.utils.parametrizations.weight_norm(rnn, "weight_hh_l0")
    check("not a plain tensor")


def test_float16_runs_in_python():
    with pytest.warns(UserWarning, match="the weights have the dtypes .*torch.float16"):
        rnnfast.generate(*model_of(dtype=torch.float16), prompt_of(), steps=2)


def test_dropout_in_training_runs_in_python():
    model = model_of(dropout=0.5)
    with pytest.warns(UserWarning, match="call eval"):
        rnnfast.generate(*model, prompt_of(), steps=2)
    for module in model:
        module.eval()
    natively(rnnfast.generate, *model, prompt_of(), steps=2)
    model = model_of(layers=1)
    model[1].dropout = 0.5  # there is no second layer that would read it
    natively(rnnfast.generate, *model, prompt_of(), steps=2)


BAD = {
    "steps": ({"steps": -1}, ValueError, "steps is -1"),
    "temperature": ({"temperature": -0.5}, ValueError, "temperature is -0.5"),
    "nan": ({"temperature": math.nan}, ValueError, "temperature is nan"),
    "inf": ({"temperature": math.inf}, ValueError, "temperature is inf"),
    "fraction": ({"top_k": 2.5}, TypeError, "float"),
    "stop at a fraction": ({"stop": 2.5}, TypeError, "float"),
    "top_k": ({"top_k": 0}, ValueError, "top_k is 0"),
    "top_p": ({"top_p": 1.5}, ValueError, "top_p is 1.5"),
    "no top_p": ({"top_p": 0}, ValueError, "top_p is 0"),
    "stop": ({"stop": 23}, ValueError, r"stop is 23; expected a token in range\(23\)"),
    "stop below": ({"stop": -1}, ValueError, "stop is -1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_numbers(case):
    options, error, message = BAD[case]
    with pytest.raises(error, match=message):
        rnnfast.generate(*model_of(), prompt_of(), **{"steps": 3} | options)


def test_bad_modules_and_prompts():
    embedding, rnn, head = model_of()
    with pytest.raises(IndexError, match=r"tokens from 0 to 23; expected tokens in range\(23\)"):
        rnnfast.generate(embedding, rnn, head, torch.tensor([[0, 23]]), steps=1)
    with pytest.raises(IndexError, match=r"tokens from -1 to 0; expected tokens in range\(23\)"):
        rnnfast.generate(embedding, rnn, head, torch.tensor([[0, -1]]), steps=1)
    for bad in (torch.tensor([0, 1, 2]), torch.zeros(2, 0).long(), torch.zeros(2, 1).int()):
        words = re.escape(f"shape {tuple(bad.shape)} and dtype {bad.dtype}")
        with pytest.raises(ValueError, match=words):
            rnnfast.generate(embedding, rnn, head, bad, steps=1)
    with pytest.raises(ValueError, match="one-hot inputs have 23 features; rnn has input_size 11"):
        rnnfast.generate(None, rnn, head, prompt_of(), steps=1)
    with pytest.raises(TypeError, match="embedding is a Identity; expected a"):
        rnnfast.generate(nn.Identity(), rnn, head, prompt_of(), steps=1)
    with pytest.raises(ValueError, match="embedding has 9 tokens, and head has 23"):
        rnnfast.generate(nn.Embedding(9, 11), rnn, head, prompt_of(), steps=1)
    with pytest.raises(ValueError, match="embedding has 5 features; rnn has input_size 11"):
        rnnfast.generate(nn.Embedding(23, 5), rnn, head, prompt_of(), steps=1)
    with pytest.raises(ValueError, match="bidirectional"):
        rnnfast.generate(
            embedding, rnnfast.LSTM(11, 19, bidirectional=True), nn.Linear(38, 23), prompt_of(), steps=1
        )
    with pytest.raises(ValueError, match="head has in_features 20; the outputs of rnn have 19"):
        rnnfast.generate(embedding, rnn, nn.Linear(20, 23).double(), prompt_of(), steps=1)
    for bad in ((embedding, rnnfast.LSTMCell(11, 19), head), (embedding, rnn, nn.Identity())):
        with pytest.raises(TypeError, match=r"(rnn is a LSTMCell|head is a Identity); expected a"):
            rnnfast.generate(*bad, prompt_of(), steps=1)
    for bad, kind in (([[1]], "list"), (np.ones((1, 1), np.int64), "ndarray")):
        with pytest.raises(TypeError, match=f"prompt is a {kind}"):
            rnnfast.generate(embedding, rnn, head, bad, steps=1)
    for bad in (1e3, -1e3, math.nan):
        options = {"steps": 1, "beams": 2, "stop": 1, "length_penalty": bad}
        with pytest.raises(ValueError, match=f"length_penalty is {bad}"):
            rnnfast.beam_search(embedding, rnn, head, prompt_of(), **options)
    with pytest.raises(ValueError, match="beams is 0"):
        rnnfast.beam_search(embedding, rnn, head, prompt_of(), steps=1, beams=0, stop=1)


def test_the_extension_checks_all_sizes():
    model = LanguageModel(*model_of())
    y, h, c = (
        torch.randn(5, 19).double(),
        torch.zeros(2, 5, 19).double(),
        torch.zeros(2, 5, 19).double(),
    )
    outputs = (
        torch.zeros(5, 4, dtype=torch.int64),
        torch.zeros(5, dtype=torch.int64),
        torch.zeros(5).double(),
    )
    uniforms = torch.zeros(4, 5).double()

    def call(state=(y, h, c), uniforms=uniforms, outputs=outputs, sampling=(1.0, 0, 1.0, -1)):
        stack = ops.stack_of(model.rnn._config())
        _C.generate(stack, 1, model.tensors(), state, sampling, uniforms, outputs)

    call()
    for bad in (
        {"state": (y[:4], h, c)},
        {"state": (y, h[:1], c)},
        {"state": (y, h, c[:, :4])},
        {"uniforms": uniforms[:3]},
        {"uniforms": uniforms.t().contiguous().t()},
        {"outputs": (outputs[0].t().contiguous().t(), *outputs[1:])},
        {"outputs": (outputs[0], outputs[1][:4], outputs[2])},
        {"sampling": (-1.0, 0, 1.0, -1)},
    ):
        with pytest.raises(ValueError):  # noqa: PT011
            call(**bad)
    for bad in (
        {"state": (y.float(), h, c)},
        {"state": (y, h.float(), c)},
        {"uniforms": uniforms.float()},
        {"outputs": (outputs[0].int(), *outputs[1:])},
    ):
        with pytest.raises(TypeError):
            call(**bad)


@pytest.mark.parametrize("loop", [rnnfast.generate, partial(rnnfast.beam_search, beams=4, stop=0)])
def test_ctrl_c_ends_the_loop(loop):
    model = model_of("lstm", 2000, 256, dtype=torch.float32)
    # A process that a shell starts in the background ignores the signal.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(0.5, signal.raise_signal, [signal.SIGINT]).start()
    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        loop(*model, prompt_of(8), steps=200_000)
    assert time.perf_counter() - start < 20  # all steps would take minutes


MORE_PROCESSORS = """
import os, threading, time
import torch, rnnfast
from rnnfast import _C

classes, hidden, rows = 400, 513, 128
rnn = rnnfast.RNN(4, hidden).bfloat16()
modules = torch.nn.Embedding(classes, 4).bfloat16(), rnn, torch.nn.Linear(hidden, classes).bfloat16()
prompt = torch.zeros(rows, 1, dtype=torch.long)

def tokens():
    generator = torch.Generator().manual_seed(0)
    return rnnfast.generate(*modules, prompt, steps=100, generator=generator).tokens

def get_more(seconds):
    time.sleep(seconds)
    _C.force_partition("chosen", oversubscribe=True)

torch.set_num_threads(4)
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
tokens()
start = time.perf_counter()
expected = tokens()
seconds = time.perf_counter() - start
for _ in range(3):
    _C.force_partition("chosen", oversubscribe=False)
    thread = threading.Thread(target=get_more, args=[seconds / 2])
    start = time.perf_counter()
    thread.start()
    assert torch.equal(tokens(), expected)
    end = time.perf_counter()
    thread.join()
    if end > start + 0.6 * seconds:  # it went on for a while with more threads
        break
else:
    raise AssertionError("the threads never changed during a run")
"""


def test_a_process_may_get_more_processors_while_it_generates(python):
    """The head's scratch memory is that of as many threads as now, not of those of the first token."""
    python(MORE_PROCESSORS)
