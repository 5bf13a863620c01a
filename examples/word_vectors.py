"""Word vectors of two language models of the King James Bible: of a window and of a recurrent one.

The data are those of language_model.py. The first model is that of Bengio et al. (2003). It sees the
last four words, and joins their vectors in one layer of tanh. The second model has two layers of GRU in
the place of the window. Both share the word vectors with the softmax, and train on the same words. The
number is the perplexity of the GRU on the test verses. It must beat that of the window. The program
prints the nearest neighbours of some words by the cosine, and the share of analogies (man to woman as
king to queen) that the vectors solve. Then a tagger learns with the GRU's vectors, as they are and
trained further (word_tagger.py). The figure shows the vectors of some words on their first two
principal components, by t-SNE too if scikit-learn is installed, and the numbers of the tagger.
"""

import importlib.util
from functools import partial
from pathlib import Path
from types import ModuleType

import matplotlib.pyplot as plt
import report
import torch
import verses
import word_tagger
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


def planes(vectors: torch.Tensor) -> dict[str, torch.Tensor]:
    """The vectors in two dimensions, [N, 2], by each method that is installed."""
    centered = vectors - vectors.mean(0)
    torch.manual_seed(0)
    points = {"principal components": centered @ torch.pca_lowrank(centered, q=2, center=False)[2]}
    if importlib.util.find_spec("sklearn"):
        from sklearn.manifold import TSNE

        places = TSNE(perplexity=8, metric="cosine", init="random", random_state=0)
        points["t-SNE"] = torch.from_numpy(places.fit_transform(vectors.numpy()))
    return points


def draw(data: Verses, vectors: torch.Tensor, scores: dict[str, list[float]]) -> Figure:
    words = [word for group in GROUPS.values() for word in group.split()]
    points = planes(vectors[[data.symbols.index(word) for word in words]])
    rows = [list(points), ["tagger"] * len(points)]
    figure = plt.figure(figsize=(10, 11) if len(points) == 1 else (13, 10), layout="constrained")
    axes = figure.subplot_mosaic(rows, height_ratios=(4, 1))
    for method, places in points.items():
        plane = axes[method]
        for name, group in GROUPS.items():
            part = places[[words.index(word) for word in group.split()]]
            dots = plane.scatter(*part.T, label=name)
            for word, place in zip(group.split(), part.tolist(), strict=True):
                color = dots.get_facecolor()[0]
                plane.annotate(word, place, (4, 3), textcoords="offset points", color=color, size=8)
        plane.set(title=f"Word vectors of the GRU: {method}", xticks=[], yticks=[])
        plane.margins(0.12)
    axes["principal components"].legend()
    bars = axes["tagger"]
    for k, (start, numbers) in enumerate(scores.items()):
        shown = bars.barh([n + 0.27 * (k - 1) for n in range(len(numbers))], numbers, 0.25, label=start)
        bars.bar_label(shown, fmt="%.3f", padding=3)
    bars.set(title="The vectors in a tagger of capitals: F1", xlim=(0.5, 1))
    bars.set_yticks(range(len(word_tagger.TAGGED)), [f"{n:,} verses" for n in word_tagger.TAGGED])
    bars.invert_yaxis()
    bars.legend(loc="upper right")
    return figure


def main() -> None:
    arguments = report.parser(__doc__.split("\n")[0], "word_vectors").parse_args()
    settings, data = QUICK if arguments.quick else FULL, verses.load("words")
    counts = torch.bincount(data.train, minlength=len(data.symbols)) + 1
    frequencies = counts / counts.sum()

    def build_window(_: ModuleType) -> LanguageModel:
        return LanguageModel(Window, frequencies, settings)

    def build_recurrent(package: ModuleType) -> LanguageModel:
        return LanguageModel(package.GRU, frequencies, settings)

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
    vectors = trained.model[0].embedding.weight.detach()
    scores = word_tagger.compare(data, vectors, arguments)
    for start, numbers in scores.items():
        counts = zip(word_tagger.TAGGED, numbers, strict=True)
        print(f"{start}:", ", ".join(f"F1 {f1:.3f} after {count} verses" for count, f1 in counts))
    values = trained.model[1][-1][1], window.model[1][-1][1], "window", "lower"
    result = report.Result("word vectors", "perplexity of words", *values)
    figure = draw(data, F.normalize(vectors, dim=1), scores)
    report.finish(result, trained, figure, arguments)


if __name__ == "__main__":
    main()
