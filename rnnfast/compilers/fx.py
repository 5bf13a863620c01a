"""Makes rnnfast's modules leaves of a graph of torch.fx, as torch.nn's are."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch

#: torch's module with the tracer of quantization, which has its own rule for leaves.
QUANTIZATION = "torch.ao.quantization.fx.tracer"


def admit(kinds: Container[type], tracer: Any = torch.fx.Tracer) -> None:
    """Make instances of exactly these classes leaves; torch.fx takes only classes of torch.nn."""
    is_leaf: Any = tracer.is_leaf_module

    def is_leaf_module(self: Any, m: torch.nn.Module, module_qualified_name: str) -> bool:
        return type(m) in kinds or bool(is_leaf(self, m, module_qualified_name))

    tracer.is_leaf_module = is_leaf_module


def admit_in_quantization(module: Any, kinds: Container[type]) -> None:
    """As :func:`admit`, for the tracer of quantization. The leaves are not quantized."""
    tracer = getattr(module, "QuantizationTracer", None)
    if tracer is not None:
        admit(kinds, tracer)
