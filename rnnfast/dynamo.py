"""Lets torch.compile look into our modules.

Dynamo breaks its graph at any instance of torch.nn's RNN, LSTM or GRU, unless
``torch._dynamo.config.allow_rnn`` is set, which would change what torch.nn's own modules do. Ours are
instances of those classes. So the one function that asks is told otherwise for them alone.
"""

from __future__ import annotations

from typing import Any

from . import when_imported

_BUILDER = "torch._dynamo.variables.builder"


def admit(kind: type) -> None:
    """Have instances of ``kind`` traced, as soon as Dynamo is imported."""
    when_imported.call(_BUILDER, lambda builder: _patch(builder, kind))


def _patch(builder: Any, kind: type) -> None:
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
