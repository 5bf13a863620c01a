"""LSTM, GRU, RNN and their cells, as subclasses of torch.nn's.

The kernels compute a call that they cover. torch's operators compute a call under a transform of
torch.func. torch's own ``forward`` computes any other call (another device, invalid input), so results
and exceptions are torch's.
"""

from __future__ import annotations

import torch

from .. import compilers
from .cells import GRUCell, LSTMCell, RNNCell
from .layers import GRU, LSTM, RNN

__all__ = ["GRU", "LSTM", "ORIGINALS", "RNN", "GRUCell", "LSTMCell", "RNNCell"]

#: For each class of rnnfast the class of torch.nn that it replaces.
ORIGINALS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    RNN: torch.nn.RNN,
    LSTM: torch.nn.LSTM,
    GRU: torch.nn.GRU,
    RNNCell: torch.nn.RNNCell,
    LSTMCell: torch.nn.LSTMCell,
    GRUCell: torch.nn.GRUCell,
}

compilers.install(ORIGINALS)
