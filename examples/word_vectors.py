"""Word vectors of two language models of the King James Bible: of a window and of a recurrent one.

The data are those of language_model.py. The first model is that of Bengio et al. (2003). It sees the
last four words, and joins their vectors in one layer of tanh. The second model has two layers of GRU in
the place of the window. Both share the word vectors with the softmax, and train on the same words. The
number is the perplexity of the GRU on the test verses. It must beat that of the window. The program
prints the nearest neighbours of some words by the cosine, and the share of analogies (man to woman as
king to queen) that the vectors solve. The figure shows the GRU's vectors of some words on their first
two principal components.
"""

import importlib.util
from functools import partial
from pathlib import Path
from types import ModuleType

import matplotlib.pyplot as plt
import report
import torch
import verses
from language_model import LanguageModel
from matplotlib.figure import Figure
from torch.nn import functional as F
from verses import Settings, Verses

QUICK = Settings(128, 0.0, 8e-3, 10, 20, 500, 5)
FULL = Settings(192, 0.2, 2e-3, 20, 35, 3000, 10)
WINDOW = 4  # words
QUESTIONS = ["king", "three", "bread", "jerusalem", "saith"]
GROUPS = {
    "family": "father mother son daughter brother sister",
    "numbers": "two three four five six seven ten twelve twenty hundred thousand",
    "body": "hand foot eyes heart mouth head face feet",
    "animals": "ox sheep lamb horse lion bullock",
    "places": "jerusalem egypt babylon judah samaria zion",
    "metals": "gold silver brass iron",
    "speech": "said saith spake answered say speak",
}


class Window(torch.nn.Module):
    """Joins the vectors of the last words. Its state is the vectors before the first word."""

    def __init__(self, inputs: int, outputs: int, **_):
        super().__init__()
        self.linear = torch.nn.Linear(WINDOW * inputs, outputs)

    def forward(self, vectors: torch.Tensor, state: torch.Tensor | None = None):
        if state is None:
            state = vectors.new_zeros(WINDOW - 1, *vectors.shape[1:])
        vectors = torch.cat([state, vectors])
        return self.linear(vectors.unfold(0, WINDOW, 1).flatten(2)).tanh(), vectors[1 - WINDOW :]


def neighbours(data: Verses, vectors: torch.Tensor, word: str, count: int = 5) -> list[str]:
    """The words with the largest cosine."""
    cosines = vectors @ vectors[data.symbols.index(word)]
    return [data.symbols[k] for k in cosines.topk(count + 1).indices.tolist()[1:]]


def analogies(data: Verses) -> torch.Tensor:
    """The questions a : b = c : d whose words are all in the vocabulary, [N, 4]."""
    folder = importlib.util.find_spec("gensim").submodule_search_locations[0]
    lines = Path(folder, "test", "test_data", "questions-words.txt").read_text().lower().splitlines()
    index = {symbol: k for k, symbol in enumerate(data.symbols)}
    questions = [line.split() for line in lines if not line.startswith(":")]
    return torch.tensor([[index[w] for w in q] for q in questions if all(w in index for w in q)])


def solved(questions: torch.Tensor, vectors: torch.Tensor) -> float:
    """The share of questions where d is the word nearest to b - a + c, other than a, b and c."""
    a, b, c, d = questions.T
    cosines = (vectors[b] - vectors[a] + vectors[c]) @ vectors.T
    cosines.scatter_(1, questions[:, :3], -torch.inf)
    return (cosines.argmax(1) == d).double().mean().item()


def draw(data: Verses, vectors: torch.Tensor) -> Figure:
    figure, axes = plt.subplots(figsize=(10, 7), layout="constrained")
    words = [word for group in GROUPS.values() for word in group.split()]
    chosen = vectors[[data.symbols.index(word) for word in words]]
    chosen = chosen - chosen.mean(0)
    torch.manual_seed(0)
    points = chosen @ torch.pca_lowrank(chosen, q=2, center=False)[2]
    for name, group in GROUPS.items():
        places = points[[words.index(word) for word in group.split()]]
        dots = axes.scatter(*places.T, label=name)
        for word, place in zip(group.split(), places.tolist(), strict=True):
            color = dots.get_facecolor()[0]
            axes.annotate(word, place, (4, 3), textcoords="offset points", color=color)
    axes.set(title="Word vectors of the GRU", xlabel="first component", ylabel="second component")
    axes.legend()
    return figure


def main() -> None:
    arguments = report.parser(__doc__.split("\n")[0], "word_vectors").parse_args()
    settings, data = QUICK if arguments.quick else FULL, verses.load("words")
    counts = torch.bincount(data.train, minlength=len(data.symbols)) + 1
    frequencies = counts / counts.sum()

    def build_window(_: ModuleType) -> LanguageModel:
        return LanguageModel(Window, frequencies, settings)

    def build_recurrent(nn: ModuleType) -> LanguageModel:
        return LanguageModel(nn.GRU, frequencies, settings)

    train = partial(verses.training, data, settings)
    print("the window:")
    window = report.train(partial(train, build_window), settings.steps, arguments, 0, "window")
    print("the GRU:")
    trained = report.train(partial(train, build_recurrent), settings.steps, arguments, part="gru")
    questions = analogies(data)
    for name, (model, history) in {"window": window.model, "GRU": trained.model}.items():
        vectors = F.normalize(model.embedding.weight.detach(), dim=1)
        share = solved(questions, vectors)
        print(f"{name}: perplexity {history[-1][1]:.1f}; {share:.1%} of {len(questions)} analogies")
        for word in QUESTIONS:
            print(f"    {word}: {', '.join(neighbours(data, vectors, word))}")
    values = trained.model[1][-1][1], window.model[1][-1][1], "window", "lower"
    result = report.Result("word vectors", "perplexity of words", *values)
    report.finish(result, trained, draw(data, vectors), arguments)


if __name__ == "__main__":
    main()
