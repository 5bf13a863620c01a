"""Lets torch.compile look into our modules.

Dynamo breaks its graph at any instance of torch.nn's RNN, LSTM or GRU, unless
``torch._dynamo.config.allow_rnn`` is set, which would change what torch.nn's own modules do. Ours are
instances of those classes. So the one function that asks is told otherwise for them alone.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_BUILDER = "torch._dynamo.variables.builder"

#: Calls its first argument with the others, outside of the graph; None until Dynamo is there.
untraced: Any = None


def admit(kind: type) -> None:
    """Have instances of ``kind`` traced, as soon as Dynamo is imported."""
    if _BUILDER in sys.modules:
        _patch(sys.modules[_BUILDER], kind)
    else:
        sys.meta_path.insert(0, _Finder(kind))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the builder as the others do, and patches it once it has been loaded."""

    def __init__(self, kind: type) -> None:
        self.kind = kind

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _BUILDER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        loader: Any = spec and spec.loader
        if loader is None:
            return None
        load = loader.exec_module

        def load_and_patch(module: ModuleType) -> None:
            load(module)
            _patch(module, self.kind)

        loader.exec_module = load_and_patch
        return spec


def _patch(builder: Any, kind: type) -> None:
    global untraced
    wrap: Any = getattr(getattr(builder, "VariableBuilder", None), "wrap_module", None)
    config: Any = getattr(builder, "config", None)
    if wrap is None or not hasattr(config, "allow_rnn"):
        return  # another Dynamo: it breaks the graph there, and says so

    def wrap_module(self: Any, value: Any) -> Any:
        if not isinstance(value, kind):
            return wrap(self, value)
        with config.patch(allow_rnn=True):
            return wrap(self, value)

    builder.VariableBuilder.wrap_module = wrap_module
    disabled = getattr(sys.modules.get("torch._dynamo.eval_frame"), "DisableContext", None)
    if disabled is not None:
        untraced = disabled(msg="how many rows each step of a packed sequence has is data")(_call)


def _call(function: Any, *args: Any, **options: Any) -> Any:
    return function(*args, **options)
