"""Many to one: in which language is this name?

babel has names of territories, languages, scripts and currencies in 147 languages. A bidirectional GRU
reads a name character by character, and the last states of both directions give the language. Names of
different lengths share a batch by `lengths=`. The number is the accuracy on names outside the training
set. The baseline is naive Bayes on strings of up to three characters; with --quick on single ones.
`--vowels` tells nine speakers apart instead, by two vowels of 7 to 29 frames (JapaneseVowels in aeon).
Its baseline is the nearest neighbour by mean and deviation. The figure shows the confusions.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import matplotlib.pyplot as plt
import report
import torch
from babel import Locale, localedata
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence

import rnnfast

KINDS = ("territories", "languages", "scripts", "variants", "currency_names")
CODES = 5000  # more than there are characters


class Rows(NamedTuple):
    x: Tensor  # [rows, T] numbers of characters or [rows, T, channels], zero past the end
    lengths: Tensor
    y: Tensor

    def select(self, index: Tensor) -> "Rows":
        lengths = self.lengths[index]
        return Rows(self.x[index, : lengths.max()], lengths, self.y[index])


class Task(NamedTuple):
    rows: Rows
    train: Tensor  # numbers of rows
    test: Tensor
    classes: list[str]


class Settings(NamedTuple):
    steps: int
    batch: int = 128
    hidden: int = 128
    rate: float = 5e-3
    dropout: float = 0.1


SETTINGS = {  # of (vowels, quick)
    (False, False): Settings(steps=8000, hidden=256, rate=3e-3, dropout=0.3),
    (False, True): Settings(steps=800),
    (True, False): Settings(steps=2000, dropout=0.5),
    (True, True): Settings(steps=300, batch=64, hidden=64, dropout=0.5),
}


class Classifier(torch.nn.Module):
    def __init__(self, package: ModuleType, task: Task, s: Settings) -> None:
        super().__init__()
        _, _, *channels = task.rows.x.shape
        self.inputs = torch.nn.Linear(*channels, 64) if channels else torch.nn.Embedding(CODES, 64)
        self.gru = package.GRU(64, s.hidden, bidirectional=True, batch_first=True)
        self.dropout = torch.nn.Dropout(s.dropout)
        self.head = torch.nn.Linear(2 * s.hidden, len(task.classes))

    def forward(self, rows: Rows) -> Tensor:
        states = last_states(self.gru, self.inputs(rows.x), rows.lengths)
        return self.head(self.dropout(torch.cat([*states], dim=-1)))


def last_states(gru: torch.nn.GRU, x: Tensor, lengths: Tensor) -> Tensor:
    if isinstance(gru, rnnfast.GRU):
        return gru(x, lengths=lengths)[1]
    return gru(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))[1]


def training(package: ModuleType, steps: report.Steps, task: Task, s: Settings) -> Iterator[float]:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = Classifier(package, task, s)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, s.rate, total_steps=len(steps))
    for _ in steps.resume(model, optimizer, schedule, generator):
        chosen = torch.randint(len(task.train), (s.batch,), generator=generator)
        rows = task.rows.select(task.train[chosen])
        loss = torch.nn.functional.cross_entropy(model(rows), rows.y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        yield loss.item()
    return model.eval()


def names() -> Task:
    owners = defaultdict(set)  # the languages of a name
    for code in filter(str.isalpha, localedata.locale_identifiers()):  # en, but not en_GB
        data = localedata.load(code, merge_inherited=False)
        for text in (text for kind in KINDS for text in data.get(kind, {}).values()):
            owners[text.casefold()].add(code)
    # A name that several languages share has no single answer.
    unique = {name: code for name, (code, *others) in owners.items() if not others}
    codes = sorted(code for code, count in Counter(unique.values()).items() if count > 300)
    labelled = sorted((name, codes.index(code)) for name, code in unique.items() if code in codes)
    number = {c: i for i, c in enumerate(sorted({c for name, _ in labelled for c in name}), 1)}
    rows = padded([[number[c] for c in name] for name, _ in labelled], [y for _, y in labelled])
    order = torch.randperm(len(labelled), generator=torch.Generator().manual_seed(0))
    test, train = order.tensor_split([len(order) // 10])
    return Task(rows, train, test, [Locale("en").languages.get(code, code) for code in codes])


def vowels() -> Task:
    folder = Path(find_spec("aeon").submodule_search_locations[0], "datasets/data/JapaneseVowels")
    texts = [(folder / f"JapaneseVowels_{part}.ts").read_text() for part in ("TRAIN", "TEST")]
    train, test = ([line.split(":") for line in text.partition("@data\n")[2].split()] for text in texts)
    utterances = [[[float(v) for v in c.split(",")] for c in channels] for *channels, _ in train + test]
    frames = [list(zip(*channels, strict=True)) for channels in utterances]
    rows = padded(frames, [int(speaker) - 1 for *_, speaker in train + test])
    split = torch.arange(len(rows.y)).tensor_split([len(train)])
    return Task(rows, *split, [f"speaker {i}" for i in range(1, 10)])


def padded(sequences: list[list], y: list[int]) -> Rows:
    x = pad_sequence([torch.tensor(sequence) for sequence in sequences], batch_first=True)
    return Rows(x, torch.tensor([len(sequence) for sequence in sequences]), torch.tensor(y))


def naive_bayes(task: Task, longest: int) -> Tensor:
    (x, _, y), classes = task.rows, len(task.classes)
    scores = y[task.train].bincount().log().repeat(len(y), 1)
    for n in range(1, longest + 1):
        windows = torch.nn.functional.pad(x, (1, 1)).unfold(1, n, 1)  # zeros mark both ends of a name
        row, start = windows.any(-1).nonzero(as_tuple=True)
        string = (windows[row, start] * CODES ** torch.arange(n)).sum(-1).unique(return_inverse=True)[1]
        test = torch.isin(row, task.test)
        cells = (string * classes + y[row])[~test]
        counts = cells.bincount(minlength=classes * (string.max() + 1)).view(-1, classes) + 0.05
        scores.index_add_(0, row[test], (counts / counts.sum(0)).log()[string[test]])
    return scores[task.test].argmax(-1)


def nearest_neighbour(task: Task) -> Tensor:
    utterances = [x[:length] for x, length in zip(task.rows.x, task.rows.lengths, strict=True)]
    features = torch.stack([torch.cat([u.mean(0), u.std(0, correction=0)]) for u in utterances])
    return task.rows.y[task.train[torch.cdist(features[task.test], features[task.train]).argmin(-1)]]


def draw(predicted: Tensor, task: Task, kind: str) -> plt.Figure:
    n, shown = len(task.classes), []
    counts = torch.bincount(task.rows.y[task.test] * n + predicted, minlength=n * n).view(n, n)
    shares = 100 * counts / counts.sum(1, keepdim=True)
    pairs = (shares + shares.T).triu(1).flatten().argsort(descending=True)
    for pair in pairs.tolist():
        if len(shown) < 24:  # Whole pairs: what a class is confused with is in the figure too.
            shown += [k for k in dict.fromkeys(divmod(pair, n)) if k not in shown]
    figure, axes = plt.subplots(figsize=(11, 9))
    grid = shares[shown][:, shown].round().int()
    axes.imshow(grid, cmap="Blues", vmax=150)  # 150 keeps the text legible
    for i, j in grid.nonzero().tolist():
        axes.text(j, i, grid[i, j].item(), ha="center", va="center")
    labels = {"ticks": range(len(shown)), "labels": [task.classes[k] for k in shown]}
    axes.set_xticks(**labels, rotation=60, ha="right", rotation_mode="anchor")
    axes.set_yticks(**labels)
    title = f"The {len(shown)} of {n} {kind} confused most\npercent of the row; the rest is not shown"
    axes.set(xlabel="predicted class", ylabel="true class", title=title)
    return figure


def main() -> None:
    parser = report.parser(__doc__.partition("\n")[0], "classify")
    parser.add_argument("--vowels", action="store_true", help="tell speakers apart by their vowels")
    arguments = parser.parse_args()
    settings = SETTINGS[arguments.vowels, arguments.quick]
    task, kind = (vowels(), "speakers") if arguments.vowels else (names(), "languages")
    if arguments.vowels:
        name, baseline = "nearest neighbour", nearest_neighbour(task)
    else:
        name = "naive Bayes" + " of single characters" * arguments.quick
        baseline = naive_bayes(task, longest=1 if arguments.quick else 3)
    trained = report.train(partial(training, task=task, s=settings), settings.steps, arguments)
    with torch.inference_mode():
        logits = [trained.model(task.rows.select(part)) for part in task.test.split(500)]
    predicted = torch.cat(logits).argmax(-1)
    right = torch.stack([predicted, baseline]) == task.rows.y[task.test]
    value, other = (100 * right.double().mean(1)).tolist()
    system, metric = "classify" + " --vowels" * arguments.vowels, "accuracy, percent"
    result = report.Result(system, metric, value, other, name, "higher")
    report.finish(result, trained, draw(predicted, task, kind), arguments)


if __name__ == "__main__":
    main()
