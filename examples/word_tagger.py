"""Reuses word vectors: a tagger by word that learns from few verses, for word_vectors.py.

The tagger restores the capitals of a lower-cased verse, as tagger.py does by character. A bidirectional
GRU reads the words, and says for each word whether it has a capital. It learns from 100 and from 1,000
verses, so the training lacks many names of the test. Three trainings differ in the word vectors alone:
vectors that start at random, the vectors of a language model as they are, and these vectors trained
further (fine-tuned). The number is F1 on the words with capitals.
"""

from argparse import Namespace
from collections.abc import Generator
from functools import partial
from types import ModuleType

import report
import torch
from tagger import outputs
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from verses import CASED_WORD, Verses, train_and_test

TAGGED = 100, 1000  # verses
STARTS = ["random vectors", "reused", "fine-tuned"]
UNITS, STEPS, BATCH = 64, 200, 20


class WordTagger(torch.nn.Module):
    def __init__(self, package: ModuleType, vectors: torch.Tensor, fixed: bool):
        super().__init__()
        self.embedding = torch.nn.Embedding.from_pretrained(vectors.clone(), freeze=fixed)
        self.dropout = torch.nn.Dropout(0.3)
        self.gru = package.GRU(vectors.size(1), UNITS, bidirectional=True, batch_first=True)
        self.head = torch.nn.Linear(2 * UNITS, 1)

    def forward(self, words: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        states = outputs(self.gru, self.dropout(self.embedding(words)), lengths)
        return self.head(self.dropout(states))[..., 0]


def tagged(data: Verses, verses: list[str]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each verse the numbers of its words, and whether the words have capitals."""
    pairs = []
    for verse in verses:
        capitals = [word != word.lower() for word in CASED_WORD.findall(verse)]
        pairs.append((torch.tensor(data.encode(verse)), torch.tensor(capitals)))
    return pairs


def padded(pairs: list) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Words [B, T], whether they have capitals, and whether they are more than padding."""
    words, capitals = (pad_sequence(parts, batch_first=True) for parts in zip(*pairs, strict=True))
    lengths = torch.tensor([len(verse) for verse, _ in pairs])
    return words, capitals, torch.arange(words.size(1)) < lengths[:, None]


def training(
    package: ModuleType, steps: report.Steps, pairs: list, vectors: torch.Tensor, fixed: bool
) -> Generator[float, None, WordTagger]:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = WordTagger(package, vectors, fixed)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in steps.resume(model, optimizer, generator):
        chosen = torch.randint(len(pairs), (BATCH,), generator=generator).tolist()
        words, capitals, real = padded([pairs[k] for k in chosen])
        logits = model(words, real.sum(1))[real]
        loss = F.binary_cross_entropy_with_logits(logits, capitals[real].float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()
    return model.eval()


@torch.inference_mode()
def f1(model: WordTagger, pairs: list) -> float:
    words, capitals, real = padded(pairs)
    predicted = (model(words, real.sum(1)) > 0) & real
    right = (predicted & capitals).sum()
    return (2 * right / (predicted.sum() + capitals.sum())).item()


def compare(data: Verses, vectors: torch.Tensor, arguments: Namespace) -> dict[str, list[float]]:
    """F1 of each of STARTS, for each number of tagged verses."""
    train, test = train_and_test()
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    test_pairs = tagged(data, test)
    random = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(1)) * vectors.std()
    scores: dict[str, list[float]] = {start: [] for start in STARTS}
    for count in TAGGED:
        pairs = tagged(data, [train[k] for k in order[:count]])
        for start, part in scores.items():
            print(f"a tagger, {count} verses, {start}:")
            first = random if start == "random vectors" else vectors
            run = partial(training, pairs=pairs, vectors=first, fixed=start == "reused")
            name = f"{start.replace(' ', '-')}-{count}"
            part.append(f1(report.train(run, STEPS, arguments, 0, name).model, test_pairs))
    return scores
