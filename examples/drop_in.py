"""Train an LSTM to sum its inputs. The only change from torch.nn is the class, ``rnnfast.LSTM``."""

import torch
from torch import nn

import rnnfast

torch.manual_seed(0)
lstm, head = rnnfast.LSTM(1, 64, batch_first=True), nn.Linear(64, 1)
optimizer = torch.optim.Adam([*lstm.parameters(), *head.parameters()], 3e-3)
for step in range(301):
    x = torch.randn(64, 30, 1)
    y, _ = lstm(x)
    loss = nn.functional.mse_loss(head(y), x.cumsum(1))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 50 == 0:
        print(f"step {step:3}  loss {loss.item():.4f}")
