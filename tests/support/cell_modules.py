"""Every cell as a layer of rnnfast: the class, and the options that choose the cell."""

from __future__ import annotations

import pytest

import rnnfast

CELLS = {
    "rnn_tanh": (rnnfast.RNN, {}),
    "rnn_relu": (rnnfast.RNN, {"nonlinearity": "relu"}),
    "lstm": (rnnfast.LSTM, {}),
    "lstm_projected": (rnnfast.LSTM, {"proj_size": 7}),
    "lstm_coupled": (rnnfast.LSTM, {"coupled_gates": True}),
    "gru": (rnnfast.GRU, {}),
    "gru_original": (rnnfast.GRU, {"reset_after": False}),
}
every_cell = pytest.mark.parametrize("cell", CELLS)
