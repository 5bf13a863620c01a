"""The task of the demo: a character language model, trained with torch.nn and rnnfast in turns."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

import rnnfast
from rnnfast.cli.common import CommandError

HIDDEN = 256
LAYERS = 2
BATCH = 32
LENGTH = 64
LEARNING_RATE = 2e-3
BLOCK = 20  # steps of one training before the other takes its turn
WARM_UP = 3


@dataclass(frozen=True)
class Text:
    source: str
    characters: str  # the alphabet; a token is an index into the alphabet
    tokens: Tensor

    def windows(self, steps: int, seed: int) -> list[Tensor]:
        """For each training step a batch of tokens [LENGTH + 1, BATCH] from random positions."""
        generator = torch.Generator().manual_seed(seed)
        limit = len(self.tokens) - LENGTH
        starts = torch.randint(limit, (steps, 1, BATCH), generator=generator)
        return list(self.tokens[starts + torch.arange(LENGTH + 1)[:, None]])


def read_text(path: Path | None) -> Text:
    source, content = ("pydoc_data.topics", pydoc_topics()) if path is None else read_file(path)
    minimum = 10 * LENGTH
    if len(content) < minimum:
        raise CommandError(f"{source} has {len(content)} characters, the demo needs at least {minimum}")
    characters = "".join(sorted(set(content)))
    index = {character: k for k, character in enumerate(characters)}
    return Text(source, characters, torch.tensor([index[character] for character in content]))


def pydoc_topics() -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise CommandError("this Python has no pydoc_data.topics: give a --text FILE") from None
    return "\n".join(topics.values())


def read_file(path: Path) -> tuple[str, str]:
    try:
        return str(path), path.read_text(encoding="utf-8")
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CommandError(f"{path} is not UTF-8 text (byte {error.start})") from error


class LanguageModel(nn.Module):
    def __init__(self, cell: str, characters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, HIDDEN)
        self.recurrent: nn.RNNBase = getattr(nn, cell)(HIDDEN, HIDDEN, LAYERS)
        self.head = nn.Linear(HIDDEN, characters)

    def forward(self, tokens: Tensor, state: object = None) -> tuple[Tensor, object]:
        y, state = self.recurrent(self.embedding(tokens), state)
        return self.head(y), state


@dataclass
class Training:
    name: str
    model: LanguageModel
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.model.parameters(), LEARNING_RATE)

    def step(self, window: Tensor) -> float:
        logits, _ = self.model(window[:-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), window[1:].flatten())
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.optimizer.step()
        return loss.item()

    def steps(self, windows: Sequence[Tensor]) -> None:
        start = time.perf_counter()
        self.losses += [self.step(window) for window in windows]
        self.seconds += time.perf_counter() - start

    @property
    def rate(self) -> float:
        return len(self.losses) / self.seconds


def pair(cell: str, text: Text, seed: int) -> tuple[Training, Training]:
    """The trainings of a model and of an accelerated copy."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LanguageModel(cell, len(text.characters))
    fast = rnnfast.accelerate(copy.deepcopy(model), report=None)
    return Training("torch.nn", model), Training("rnnfast", fast)


def train(
    trainings: Sequence[Training],
    windows: Sequence[Tensor],
    progress: Callable[[Training], None],
) -> None:
    """Run the trainings in turns of BLOCK steps, so that a change of the machine's speed affects both.

    The warm-up runs on copies, so it changes neither the models nor the times.
    """
    for training in trainings:
        Training("warm-up", copy.deepcopy(training.model)).steps(windows[:WARM_UP])
    for start in range(0, len(windows), BLOCK):
        for training in trainings:
            training.steps(windows[start : start + BLOCK])
            progress(training)


@torch.no_grad()
def sample(
    model: LanguageModel, text: Text, prompt: str, temperature: float, seed: int
) -> Iterator[str]:
    """Sample text without end, one character and one step of the model at a time."""
    generator = torch.Generator().manual_seed(seed)
    tokens = [text.characters.index(c) for c in prompt if c in text.characters] or [0]
    logits, state = model(torch.tensor(tokens)[:, None])
    while True:
        probabilities = torch.softmax(logits[-1, 0] / temperature, 0)
        token = torch.multinomial(probabilities, 1, generator=generator)
        yield text.characters[int(token)]
        logits, state = model(token[:, None], state)
