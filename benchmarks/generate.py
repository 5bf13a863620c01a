"""rnnfast.generate beside the loop that a user writes in Python, with torch.nn and with rnnfast.

Run: python benchmarks/generate.py [--threads N] [--rounds N]

The ways take turns. The table has medians of microseconds for one step of all rows, with quartiles.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import rnnfast

CASES = [  # cell, B, H, V, options of generate
    ("LSTM", 1, 256, 100, {}),
    ("GRU", 1, 256, 100, {}),
    ("LSTM", 1, 256, 100, {"top_k": 20}),
    ("LSTM", 1, 256, 100, {"temperature": 0}),
    ("LSTM", 16, 256, 100, {}),
    ("LSTM", 1, 512, 10_000, {}),
    ("LSTM", 64, 512, 10_000, {}),
    ("LSTM", 64, 512, 10_000, {"top_k": 50}),
    ("LSTM", 64, 512, 10_000, {"top_p": 0.9}),
]


def loop(embedding, rnn, head, prompt, steps, temperature=1.0, top_k=None, top_p=None):
    """The loop of most tutorials."""
    tokens, state, token = [], None, prompt
    with torch.no_grad():
        for _ in range(steps):
            y, state = rnn(embedding(token).transpose(0, 1), state)
            scores = head(y[-1])
            if temperature == 0:
                token = scores.argmax(-1, keepdim=True)
            else:
                if top_k is not None:
                    scores[scores < scores.topk(top_k).values[:, -1:]] = -torch.inf
                probabilities = (scores / temperature).softmax(-1)
                if top_p is not None:
                    ordered, places = probabilities.sort(descending=True)
                    ordered[ordered.cumsum(-1) - ordered > top_p] = 0
                    token = places.gather(-1, torch.multinomial(ordered, 1))
                else:
                    token = torch.multinomial(probabilities, 1)
            tokens.append(token)
    return torch.cat(tokens, 1)


def ways_of(cell, batch, hidden, classes, options) -> dict[str, Callable[[int], object]]:
    torch.manual_seed(0)
    embedding, head = nn.Embedding(classes, hidden), nn.Linear(hidden, classes)
    rnn, torch_rnn = getattr(rnnfast, cell)(hidden, hidden), getattr(nn, cell)(hidden, hidden)
    torch_rnn.load_state_dict(rnn.state_dict())
    prompt = torch.randint(classes, (batch, 1))

    def frozen_loop(steps):
        with rnnfast.frozen(rnn):
            return loop(embedding, rnn, head, prompt, steps, **options)

    return {
        "loop, torch.nn": lambda steps: loop(embedding, torch_rnn, head, prompt, steps, **options),
        "loop, rnnfast": frozen_loop,
        "generate": lambda steps: rnnfast.generate(
            embedding, rnn, head, prompt, steps=steps, **options
        ),
    }


def microseconds(ways, rounds: int) -> dict[str, list[float]]:
    steps = {}
    for name, way in ways.items():
        way(3)
        start = time.perf_counter()
        way(20)
        steps[name] = max(20, round(0.1 * 20 / (time.perf_counter() - start)))
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way(steps[name])
            samples[name].append((time.perf_counter() - start) / steps[name] * 1e6)
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    table = Table("case", "loop, torch.nn", "loop, rnnfast", "generate", "torch.nn / generate")
    for cell, batch, hidden, classes, options in CASES:
        samples = microseconds(ways_of(cell, batch, hidden, classes, options), arguments.rounds)
        texts = []
        for times in samples.values():
            low, middle, high = statistics.quantiles(times, n=4)
            texts.append(f"{middle:.0f} ({low:.0f}-{high:.0f})")
        medians = [statistics.median(times) for times in samples.values()]
        option = ", ".join(f"{name}={value}" for name, value in options.items())
        name = f"{cell} B={batch} H={hidden} V={classes} {option}"
        table.add_row(name, *texts, f"{medians[0] / medians[2]:.1f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
