"""Lets torch.fx take our modules for leaves of its graph, as it takes torch.nn's."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch


def admit(kinds: Container[type]) -> None:
    """Have instances of these very classes be one node each; torch.fx asks where a class is defined."""
    is_leaf: Any = torch.fx.Tracer.is_leaf_module

    def is_leaf_module(self: Any, m: torch.nn.Module, module_qualified_name: str) -> bool:
        return type(m) in kinds or bool(is_leaf(self, m, module_qualified_name))

    torch.fx.Tracer.is_leaf_module = is_leaf_module  # type: ignore[method-assign]
