"""Lets torch.compile trace rnnfast's modules.

Dynamo breaks the graph at any instance of torch.nn's RNN, LSTM or GRU unless
``torch._dynamo.config.allow_rnn`` is set. rnnfast's modules are instances of these classes. The setting
would also change how Dynamo treats torch.nn's own modules, so it is set only while Dynamo looks at an
instance of rnnfast's classes.

Tried: the whole call as one function of the graph has a third of the guards, and gains 8 of 102 us of a
small inference. That is too little to hide the code from Dynamo.
"""

from __future__ import annotations

from typing import Any

#: Dynamo's module that reads allow_rnn.
BUILDER = "torch._dynamo.variables.builder"


def admit(builder: Any, kinds: tuple[type, ...]) -> None:
    """Make Dynamo trace instances of ``kinds``."""
    wrap: Any = getattr(getattr(builder, "VariableBuilder", None), "wrap_module", None)
    config: Any = getattr(builder, "config", None)
    if wrap is None or not hasattr(config, "allow_rnn"):
        return  # an unknown version of Dynamo, which breaks the graph with a message

    def wrap_module(self: Any, value: Any) -> Any:
        if not isinstance(value, kinds):
            return wrap(self, value)
        with config.patch(allow_rnn=True):
            return wrap(self, value)

    builder.VariableBuilder.wrap_module = wrap_module


def leave_out(dynamo: Any, kinds: tuple[type, ...]) -> None:
    """Make Dynamo run ``forward`` of ``kinds`` as it is, with all functions that it calls.

    Dynamo breaks the graph at the modules. Without this it would compile the functions inside of them
    one by one, and those that ask whether they are compiled would choose another way than eager calls.
    """
    for kind in kinds:
        kind.forward = dynamo.disable(kind.forward)  # type: ignore[attr-defined]
