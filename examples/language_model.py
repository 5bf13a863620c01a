"""A language model of the King James Bible: the next word from all the words before it.

The data are 31,102 verses (verses.py). The first 90 percent train, and the next 1,500 test. The model
is an embedding, two layers of LSTM (`--cell GRU`: of GRU) and a linear head that shares the embedding's
weights. Each row of a batch is a long text. The state goes on from one piece of a row to the next, and
the gradient stops between the pieces. The number is the perplexity of the test verses. A quick run must
beat the frequencies of the words. A full run must beat the modified Kneser-Ney trigram (ngrams.py). The
figure shows the perplexity during the training, and verses that the model wrote. `--characters` models
characters, with a 6-gram as the baseline.

`torchrun --nproc-per-node 2 examples/language_model.py` trains in two processes. They share each
batch. The loss is that of one process with the whole batch.
"""

import math
import textwrap
from functools import partial
from types import ModuleType

import matplotlib.pyplot as plt
import ngrams
import numpy as np
import report
import torch
import verses
from matplotlib.figure import Figure
from torch import distributed
from torch.nn import functional as F
from verses import Settings, Verses

import rnnfast

SETTINGS = {  # by unit and --quick
    ("words", True): Settings(128, 0.0, 8e-3, 10, 20, 700, 5),
    ("words", False): Settings(320, 0.3, 2e-3, 20, 35, 8000, 20),
    ("characters", True): Settings(128, 0.0, 6e-3, 32, 64, 400, 5),
    ("characters", False): Settings(256, 0.1, 3e-3, 32, 100, 6000, 10),
}
LONGEST = {"words": 50, "characters": 250}  # symbols of a written verse
SENTENCES = [  # The model should find the first of each two likelier.
    *("and the lord spake unto moses.", "and the moses spake unto lord."),
    *("and he went out of the city.", "and he went out of the bread."),
]
PROMPTS = ["and god said,", "in the days of the king", "the wisdom of", "blessed are they", "but jesus"]


class LanguageModel(torch.nn.Module):
    def __init__(self, layer: type[torch.nn.Module], frequencies: torch.Tensor, settings: Settings):
        super().__init__()
        width = settings.width
        self.embedding = torch.nn.Embedding(len(frequencies), width)
        self.dropout = torch.nn.Dropout(settings.dropout)
        self.rnn = layer(width, width, num_layers=2, dropout=settings.dropout)
        self.head = torch.nn.Linear(width, len(frequencies))
        self.head.weight = self.embedding.weight
        torch.nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        with torch.no_grad():  # The untrained model gives each symbol its frequency.
            self.head.bias.copy_(frequencies.log())

    def forward(self, symbols: torch.Tensor, state=None):
        outputs, state = self.rnn(self.dropout(self.embedding(symbols)), state)
        return self.head(self.dropout(outputs)), state


@torch.no_grad()
def log_probability(model: LanguageModel, sentence: list[int], end: int) -> float:
    """The natural logarithm of a sentence's probability after the end of a verse."""
    logits, _ = model(torch.tensor([end, *sentence[:-1]])[:, None])
    return -F.cross_entropy(logits[:, 0], torch.tensor(sentence), reduction="sum").item()


def write(model: LanguageModel, data: Verses, generator: torch.Generator) -> list[str]:
    """A verse for each prompt."""
    end = data.symbols.index(verses.END)
    written = []
    for prompt in map(data.encode, PROMPTS):
        tokens, lengths, *_ = rnnfast.generate(
            *(model.embedding, model.rnn, model.head),
            torch.tensor([[end, *prompt]]),
            steps=LONGEST[data.unit],
            temperature=0.7,
            stop=end,
            generator=generator,
        )
        verse = [token for token in tokens[0, : lengths[0]].tolist() if token != end]
        written.append(data.decode(prompt + verse))
    return written


def perplexity_of_ngram(data: Verses, order: int) -> float:
    model = ngrams.fit(data.train.numpy(), order, len(data.symbols))
    return math.exp(-np.log(ngrams.probabilities(model, data.test.numpy())).mean())


def draw(trained: report.Trained, baselines: dict[str, float], written: list[str]) -> Figure:
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 4.5), width_ratios=[3, 2], layout="constrained"
    )
    window = max(1, len(trained.losses) // 50)
    smooth = torch.tensor(trained.losses).unfold(0, window, 1).mean(1).exp()
    steps = np.arange(window, len(trained.losses) + 1)
    left.plot(steps, smooth, color="0.75", label="model, training verses")
    left.plot(*zip(*trained.model[1], strict=True), "o-", label="model, test verses")
    for (name, value), style in zip(baselines.items(), ("--", ":"), strict=True):
        left.axhline(value, color="black", linestyle=style, label=f"{name}, test verses")
    left.set(title="King James Bible", xlabel="step", ylabel="perplexity", yscale="log")
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter("{x:g}")
    left.legend(loc="upper right", bbox_to_anchor=(1, 0.93))
    right.set_title("Verses that the model wrote")
    right.axis("off")
    text = "\n\n".join(textwrap.fill(verse, 46) for verse in written)
    right.text(0, 0.98, text, va="top", size=11, fontfamily="serif", transform=right.transAxes)
    return figure


def main() -> None:
    parser = report.parser(__doc__.split("\n")[0], "language_model")
    parser.add_argument("--characters", action="store_true")
    parser.add_argument("--cell", choices=["LSTM", "GRU"], default="LSTM")
    arguments = parser.parse_args()
    if distributed.is_torchelastic_launched():
        if arguments.checkpoint:
            parser.error("--checkpoint keeps the training of one process, and torchrun starts several")
        distributed.init_process_group("gloo")
    data = verses.load("characters" if arguments.characters else "words")
    settings = SETTINGS[data.unit, arguments.quick]
    orders = {"unigram": 1, "6-gram": 6} if arguments.characters else {"unigram": 1, "trigram": 3}
    baselines = {name: perplexity_of_ngram(data, order) for name, order in orders.items()}
    baseline = list(baselines)[0 if arguments.quick else 1]
    if report.FIRST:
        unknown = (data.test == 0).double().mean()
        print(f"{len(data.train):,} {data.unit} to train, {len(data.test):,} to test,", end=" ")
        print(f"{unknown:.1%} of them unknown; vocabulary {len(data.symbols):,}")
    counts = torch.bincount(data.train, minlength=len(data.symbols)) + 1

    def build(package: ModuleType) -> LanguageModel:
        return LanguageModel(getattr(package, arguments.cell), counts / counts.sum(), settings)

    trained = report.train(partial(verses.training, data, settings, build), settings.steps, arguments)
    if distributed.is_initialized():
        distributed.destroy_process_group()
    if not report.FIRST:
        return
    model, history = trained.model
    end = data.symbols.index(verses.END)
    for sentence in SENTENCES:
        print(f"ln P = {log_probability(model, data.encode(sentence), end):6.1f}: {sentence}")
    written = write(model, data, torch.Generator().manual_seed(0))
    name, metric = "language model", f"perplexity of {data.unit}"
    result = report.Result(name, metric, history[-1][1], baselines[baseline], baseline, "lower")
    report.finish(result, trained, draw(trained, baselines, written), arguments)


if __name__ == "__main__":
    main()
