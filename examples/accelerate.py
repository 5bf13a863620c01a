"""Accelerate an existing model of torch.nn in the middle of its training."""

import copy
import time

import torch
from torch import nn

import rnnfast


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, 64)
        self.encoder = nn.GRU(64, 96, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(192, 10)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.embedding(words))[0])


def train(model: Tagger, optimizer: torch.optim.Optimizer, steps: int) -> float:
    """Train on fixed random sentences; returns the loss of the last step."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(1000, (32, 40), generator=generator)
    start = time.perf_counter()
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(words).flatten(0, 1), words.flatten() % 10)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"  {(time.perf_counter() - start) / steps * 1e3:.1f} ms a step, loss {loss.item():.6f}")
    return loss.item()


torch.manual_seed(0)
model = Tagger()
optimizer = torch.optim.Adam(model.parameters())
print("torch.nn, the first steps:")
train(model, optimizer, 20)

before = copy.deepcopy((model, optimizer))
# The parameters stay the same objects, so the optimizer and its moments remain valid.
rnnfast.accelerate(model)  # prints what it replaced

print("rnnfast, the next steps:")
actual = train(model, optimizer, 20)
print("torch.nn, the same steps:")
expected = train(*before, 20)
print(f"losses differ by {abs(actual - expected):.1e}")
