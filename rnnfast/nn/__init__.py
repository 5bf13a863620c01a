"""LSTM, GRU, RNN and their cells, as subclasses of torch.nn's.

A call that the kernels cover runs on them, one under a transform of torch.func on torch's operators.
Any other (another device, bad input) runs torch's own ``forward``, so its answers and exceptions are
torch's.
"""

from __future__ import annotations

import torch

from .. import compilers
from .cells import GRUCell, LSTMCell, RNNCell
from .layers import GRU, LSTM, RNN

__all__ = ["GRU", "LSTM", "ORIGINALS", "RNN", "GRUCell", "LSTMCell", "RNNCell"]

#: Each class, and the one of torch.nn whose place it takes.
ORIGINALS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    RNN: torch.nn.RNN,
    LSTM: torch.nn.LSTM,
    GRU: torch.nn.GRU,
    RNNCell: torch.nn.RNNCell,
    LSTMCell: torch.nn.LSTMCell,
    GRUCell: torch.nn.GRUCell,
}

compilers.install(ORIGINALS)
