"""Makes rnnfast's modules leaves of a graph of torch.fx, as torch.nn's are."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch


def admit(kinds: Container[type]) -> None:
    """Make instances of exactly these classes leaves; torch.fx takes only classes of torch.nn."""
    is_leaf: Any = torch.fx.Tracer.is_leaf_module

    def is_leaf_module(self: Any, m: torch.nn.Module, module_qualified_name: str) -> bool:
        return type(m) in kinds or bool(is_leaf(self, m, module_qualified_name))

    torch.fx.Tracer.is_leaf_module = is_leaf_module  # type: ignore[method-assign]
