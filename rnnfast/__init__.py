"""Fused CPU kernels for recurrent networks, in the place of torch.nn's LSTM, GRU and RNN."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from ._version import __version__

# torch before the extension: its wheel brings the OpenMP runtime that the two then share.
if importlib.util.find_spec("torch") is not None:
    import torch as _torch  # noqa: F401

from . import arrays

if TYPE_CHECKING:
    from .convert import Report, accelerate, restore
    from .nn import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell

_TORCH_NAMES = {
    **dict.fromkeys(("GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"), "nn"),
    **dict.fromkeys(("Report", "accelerate", "restore"), "convert"),
}

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "Report",
    "__version__",
    "accelerate",
    "arrays",
    "restore",
]


def __getattr__(name: str) -> Any:
    module = _TORCH_NAMES.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f'rnnfast.{name} needs PyTorch, which is not installed: pip install "rnnfast[torch]". '
            "rnnfast.arrays works without it."
        ) from error
    value = getattr(importlib.import_module(f".{module}", __name__), name)
    globals()[name] = value
    return value
