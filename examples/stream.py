"""Process a stream step by step: the results equal those of one call, to the last bit."""

import torch

import rnnfast

torch.manual_seed(0)
gru = rnnfast.GRU(40, 64, num_layers=2)
sequence = torch.randn(200, 1, 40)

with torch.no_grad():
    outputs, last = gru(sequence)

    state, steps = None, []
    for frame in sequence:  # one frame at a time, as in a stream
        y, state = gru(frame[None], state)
        steps.append(y)

    state, chunks = None, []
    for chunk in sequence.split([1, 2, 3, 50, 144]):
        y, state = gru(chunk, state)
        chunks.append(y)

print("step by step:", torch.equal(torch.cat(steps), outputs))
print("in chunks:   ", torch.equal(torch.cat(chunks), outputs) and torch.equal(state, last))
