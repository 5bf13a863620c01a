"""Lets torch.compile look into our modules.

Dynamo breaks its graph at any instance of torch.nn's RNN, LSTM or GRU, unless
``torch._dynamo.config.allow_rnn`` is set, which would change what torch.nn's own modules do. Ours are
instances of those classes. So the one function that asks is told otherwise for them alone.

Tried: the whole call as one function of the graph has a third of the guards, and gains 8 of 102 us of a
small inference. That is too little to hide the code from Dynamo.
"""

from __future__ import annotations

from typing import Any

#: Dynamo's module that asks.
BUILDER = "torch._dynamo.variables.builder"


def admit(builder: Any, kinds: tuple[type, ...]) -> None:
    """Have instances of these classes traced."""
    wrap: Any = getattr(getattr(builder, "VariableBuilder", None), "wrap_module", None)
    config: Any = getattr(builder, "config", None)
    if wrap is None or not hasattr(config, "allow_rnn"):
        return  # another Dynamo: it breaks the graph there, and says so

    def wrap_module(self: Any, value: Any) -> Any:
        if not isinstance(value, kinds):
            return wrap(self, value)
        with config.patch(allow_rnn=True):
            return wrap(self, value)

    builder.VariableBuilder.wrap_module = wrap_module
