"""Serve a stream step by step: bitwise what the whole sequence gives in one call."""

import torch

import rnnfast

torch.manual_seed(0)
gru = rnnfast.GRU(40, 64, num_layers=2)
sequence = torch.randn(200, 1, 40)

with torch.no_grad():
    whole, last = gru(sequence)

    state, steps = None, []
    for frame in sequence:  # as they arrive
        y, state = gru(frame[None], state)
        steps.append(y)

    state, chunks = None, []
    for chunk in sequence.split([1, 2, 3, 50, 144]):
        y, state = gru(chunk, state)
        chunks.append(y)

print("step by step:", torch.equal(torch.cat(steps), whole))
print("in chunks:   ", torch.equal(torch.cat(chunks), whole) and torch.equal(state, last))
