"""Fused CPU kernels for recurrent networks, which replace torch.nn's LSTM, GRU and RNN."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import wrapt

from ._version import __version__

if TYPE_CHECKING:
    from . import arrays, cuda, init
    from .compilers import onnx
    from .convert import Report, accelerate, restore
    from .generation import Beams, Generated, beam_search, generate
    from .gradients import GradientFlow, gradient_flow
    from .nn import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
    from .stack.packed_weights import frozen

# Names are loaded at the first use: the import of torch and the extension takes a second.
_FROM_TORCH_MODULES = {
    **dict.fromkeys(("GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"), "nn"),
    **dict.fromkeys(("Report", "accelerate", "restore"), "convert"),
    **dict.fromkeys(("Beams", "Generated", "beam_search", "generate"), "generation"),
    **dict.fromkeys(("GradientFlow", "gradient_flow"), "gradients"),
    "frozen": "stack.packed_weights",
}

_MODULES = {"arrays": ".arrays", "cuda": ".cuda", "init": ".init", "onnx": ".compilers.onnx"}

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Beams",
    "GRUCell",
    "Generated",
    "GradientFlow",
    "LSTMCell",
    "RNNCell",
    "Report",
    "__version__",
    "accelerate",
    "arrays",
    "beam_search",
    "cuda",
    "frozen",
    "generate",
    "gradient_flow",
    "init",
    "onnx",
    "restore",
]


def __getattr__(name: str) -> Any:
    if name == "_C":
        return importlib.import_module("._native", __name__)._C
    if name not in _MODULES and name not in _FROM_TORCH_MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        if name in _MODULES:
            return importlib.import_module(_MODULES[name], __name__)
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(
            f'rnnfast.{name} needs PyTorch, which is not installed: pip install "rnnfast[torch]". '
            "rnnfast.arrays works without it."
        ) from error
    value = getattr(importlib.import_module(f".{_FROM_TORCH_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _define_operator(_: object) -> None:
    importlib.import_module(".compilers.operator", __name__)


# A saved program names the operator rnnfast::stack. torch loads programs with these modules.
for _loader in ("torch._export.serde.serialize", "torch._inductor.package"):
    wrapt.when_imported(_loader)(_define_operator)
