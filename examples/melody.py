"""A GRU writes new folk tunes in ABC notation, character by character, for a metre and a key.

The data are 3,803 tunes of O'Neill, Aird and Ryan from the corpus of `music21` (tunes.py). A tenth of
the tunes is held out, with all versions of each tune. The model is an embedding, a GRU and a linear
head. It reads a line such as "M:6/8 L:1/8 K:D" and then writes the melody. The number is the bits for
each character of the held-out melodies. It must beat a 6-gram with modified Kneser-Ney smoothing
(ngrams.py). The program also counts the bars of new tunes that are as long as the metre says, and
writes one tune as a MIDI file. The figure shows the bits during the training and two new tunes as piano
rolls.
"""

from collections.abc import Generator
from functools import partial
from types import ModuleType
from typing import NamedTuple

import matplotlib.pyplot as plt
import ngrams
import numpy as np
import report
import torch
import tunes
from matplotlib.figure import Figure
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

import rnnfast

ENDS = ".\n"  # the end of a tune, and of its first line
END, LINE_END = 0, 1  # their numbers
IGNORED = -100  # the target where nothing is predicted
PROMPTS = ["M:6/8 L:1/8 K:D\n", "M:C| L:1/8 K:G\n", "M:3/4 L:1/8 K:G\n", "M:9/8 L:1/8 K:Em\n"]
History = list[tuple[int, float]]  # steps and bits


class Settings(NamedTuple):
    width: int
    layers: int
    dropout: float
    rate: float
    rows: int  # tunes of a batch
    steps: int
    evaluations: int
    new_tunes: int


QUICK = Settings(192, 1, 0.0, 5e-3, 8, 800, 5, 16)
FULL = Settings(384, 2, 0.3, 2e-3, 16, 4000, 20, 100)


class MelodyModel(torch.nn.Module):
    def __init__(self, layer: type[torch.nn.GRU], symbols: int, settings: Settings):
        super().__init__()
        self.embedding = torch.nn.Embedding(symbols, 48)
        self.rnn = layer(48, settings.width, settings.layers, dropout=settings.dropout)
        self.dropout = torch.nn.Dropout(settings.dropout)
        self.head = torch.nn.Linear(settings.width, symbols)

    def forward(self, symbols: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return self.head(self.dropout(run(self.rnn, self.embedding(symbols), lengths)))


def run(rnn: torch.nn.GRU, inputs: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The outputs of rows of different lengths. What is past the end of a row is never used."""
    if isinstance(rnn, rnnfast.GRU):
        return rnn(inputs, lengths=lengths)[0]  # It stops at the end of each row.
    return rnn(inputs)[0]


class Data(NamedTuple):
    alphabet: str
    train: list[torch.Tensor]  # the numbers of the characters of each tune
    test: list[torch.Tensor]


def load() -> Data:
    groups = tunes.load()
    characters = {c for group in groups for tune in group for c in tune}
    data = Data(ENDS + "".join(sorted(characters - set(ENDS))), [], [])
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(0)).tolist()
    for place, k in enumerate(order):
        part = data.test if place < len(order) // 10 else data.train
        part += [torch.tensor([*map(data.alphabet.index, tune + ENDS[END])]) for tune in groups[k]]
    return data


def batch(chosen: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs [T, B], targets [T, B] and lengths [B]. The targets are the characters of the melodies."""
    symbols, lengths = pad_sequence(chosen), torch.tensor([len(tune) - 1 for tune in chosen])
    inputs, targets = symbols[:-1], symbols[1:]
    in_melody = ((inputs == LINE_END).cumsum(0) > 0) & (inputs != END)
    return inputs, targets.where(in_melody, IGNORED), lengths


@torch.no_grad()
def bits(model: MelodyModel, test: list[torch.Tensor]) -> float:
    """The mean bits for each character of the melodies."""
    model.eval()
    loss = count = 0
    for start in range(0, len(test), 64):
        inputs, targets, lengths = batch(test[start : start + 64])
        logits = model(inputs, lengths).flatten(0, 1)
        loss += F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum").item()
        count += (targets != IGNORED).sum().item()
    model.train()
    return loss / count / np.log(2).item()


def bits_of_ngram(data: Data, order: int) -> float:
    model = ngrams.fit(torch.cat(data.train).numpy(), order, len(data.alphabet))
    p = ngrams.probabilities(model, torch.cat(data.test).numpy())
    line_ends = [(tune == LINE_END).int() for tune in data.test]
    in_melody = torch.cat([ends.cumsum(0) > ends for ends in line_ends]).numpy()
    return -np.log2(p[in_melody]).mean()


def write(model: MelodyModel, data: Data, prompt: str, count: int) -> list[str]:
    """New tunes that begin with the prompt."""
    tokens, lengths, *_ = rnnfast.generate(
        *(model.embedding, model.rnn, model.head),
        torch.tensor([[*map(data.alphabet.index, prompt)]]).expand(count, -1),
        steps=500,
        temperature=0.7,
        stop=END,
    )
    melodies = [row[:length] for row, length in zip(tokens.tolist(), lengths, strict=True)]
    texts = ["".join(data.alphabet[token] for token in row if token != END) for row in melodies]
    return [prompt + text.replace("\n", " ") for text in texts]


def training(data: Data, settings: Settings, package: ModuleType, steps: report.Steps) -> Generator:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = MelodyModel(package.GRU, len(data.alphabet), settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(steps))
    history: History = []
    for step in steps.resume(model, optimizer, schedule, generator, history):
        chosen = torch.randint(len(data.train), (settings.rows,), generator=generator).tolist()
        inputs, targets, lengths = batch([data.train[k] for k in chosen])
        logits = model(inputs, lengths).flatten(0, 1)
        loss = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % max(20, len(steps) // settings.evaluations) == 0 or step == len(steps):
            with steps.untimed():
                history.append((step, bits(model, data.test)))
        yield loss.item()
    return model.eval(), history


def draw(history: History, baselines: dict[str, float], written: list[str]) -> Figure:
    figure = plt.figure(figsize=(13, 6), layout="constrained")
    grid = figure.add_gridspec(len(written), 2, width_ratios=[1, 3])
    left = figure.add_subplot(grid[:, 0], title="Held-out melodies", xlabel="step")
    left.set_ylabel("bits per character")
    left.plot(*zip(*history, strict=True), "o-", label="GRU")
    for (name, value), style in zip(baselines.items(), (":", "--"), strict=True):
        left.axhline(value, color="black", linestyle=style, label=name)
    left.legend()
    for row, tune in enumerate(written):
        notes, bars = tunes.parse(tune)
        metre, _, key = tune.split("\n")[0].split()
        axes = figure.add_subplot(grid[row, 1], title=f"A new tune, metre {metre[2:]}, key {key[2:]}")
        begins, ends, pitches = np.array(notes, dtype=float).reshape(-1, 3).T
        axes.barh(pitches, ends - begins, 0.9, begins, linewidth=0.4, edgecolor="white")
        axes.vlines([float(bar.start) for bar in bars], 55, 88, color="0.85", zorder=0)
        axes.set(ylim=(55, 88), yticks=[60, 72, 84], yticklabels=["C4", "C5", "C6"])
    axes.set_xlabel("time in whole notes; the lines are the bars")
    return figure


def main() -> None:
    arguments = report.parser(__doc__.split("\n")[0], "melody").parse_args()
    settings, data = QUICK if arguments.quick else FULL, load()
    baselines = {"3-gram": bits_of_ngram(data, 3), "6-gram": bits_of_ngram(data, 6)}
    print(f"{len(data.train):,} tunes to train, {len(data.test):,} held out")
    trained = report.train(partial(training, data, settings), settings.steps, arguments)
    model, history = trained.model
    torch.manual_seed(0)
    count = settings.new_tunes // len(PROMPTS)
    written = [tune for prompt in PROMPTS for tune in write(model, data, prompt, count)]
    right, inner = np.sum([tunes.right_bars(tune) for tune in written], axis=0)
    print(
        f"bars of the right length: {right / max(inner, 1):.1%} of {inner} in {len(written)} new tunes"
    )
    print("X:1\n" + written[0].replace(" ", "\n", 2))
    tunes.write_midi(arguments.figure.with_suffix(".mid"), tunes.parse(written[0])[0])
    values = history[-1][1], baselines["6-gram"], "6-gram", "lower"
    result = report.Result("melody", "bits per character", *values)
    report.finish(result, trained, draw(history, baselines, written[:: len(written) // 2]), arguments)


if __name__ == "__main__":
    main()
