"""accelerate(model): a model's recurrent modules of torch.nn become rnnfast's, in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch.nn.utils.parametrize import is_parametrized

from . import nn

__all__ = ["Entry", "Report", "accelerate", "restore"]

Model = TypeVar("Model", bound=torch.nn.Module)

_RECURRENT = (torch.nn.RNNBase, torch.nn.RNNCellBase)
_REPLACEMENTS = {original: own for own, original in nn.ORIGINALS.items()}


class Entry(NamedTuple):
    """What became of one recurrent module."""

    name: str  # its name in the model; "" for the model itself
    module: str  # its class
    replaced: bool
    reason: str


class Report(NamedTuple):
    """What :func:`accelerate` did; ``str()`` gives a line for each module."""

    entries: tuple[Entry, ...]

    def __str__(self) -> str:
        if not self.entries:
            return "rnnfast.accelerate: the model has no recurrent modules of torch.nn"
        done = sum(e.replaced for e in self.entries)
        lines = [f"rnnfast.accelerate: replaced {done} of {len(self.entries)} recurrent modules"]
        for e in self.entries:
            mark = "replaced" if e.replaced else "left"
            lines.append(f"  {mark:8} {e.name or '(the model)'}: {e.module}, {e.reason}")
        replaced = next((e.module for e in self.entries if e.replaced), None)
        if replaced is not None:
            lines += [
                f"isinstance(m, torch.nn.{replaced}) is still true.",
                f"type(m) is torch.nn.{replaced} is now false: code that tests so, as some",
                "initialisers do, must run before accelerate, or after rnnfast.restore(model).",
            ]
        return "\n".join(lines)


def accelerate(model: Model, report: Callable[[Report], object] | None = print) -> Model:
    """Make every eligible torch.nn RNN, LSTM, GRU or cell of ``model`` rnnfast's, and return ``model``.

    A module changes its class and nothing else: it stays the same object with the same parameters,
    buffers, hooks and name, so optimizers and references made before still work. Subclasses, modules
    whose ``forward`` was replaced and TorchScript modules are left as they are.

    ``isinstance(m, torch.nn.LSTM)`` holds as before, since the new class is a subclass. A test by exact
    class, ``type(m) is torch.nn.LSTM``, fails afterwards: an initialiser that has one leaves the module
    out without a word. Initialise before, or between :func:`restore` and another ``accelerate``.

    Args:
        model: any module; it may itself be recurrent.
        report: called with a :class:`Report` of what was replaced, what was left, and why; None for
            silence.

    """
    entries: list[Entry] = []
    for name, module in list(model.named_modules()):
        if not isinstance(module, _RECURRENT) or type(module) in nn.ORIGINALS:
            continue
        reason = _obstacle(module)
        entries.append(
            Entry(
                name,
                type(module).__name__,
                reason is None,
                reason or "now runs on rnnfast's kernels",
            )
        )
        if reason is None:
            module.__class__ = _REPLACEMENTS[type(module)]  # type: ignore[assignment]
    if report is not None:
        report(Report(tuple(entries)))
    return model


def restore(model: Model) -> Model:
    """Undo :func:`accelerate`: rnnfast's modules become torch.nn's again, in place; returns ``model``.

    A ``GRU`` or ``GRUCell`` with ``reset_after=False`` and an ``LSTM`` or ``LSTMCell`` with
    ``coupled_gates=True`` have no counterpart in torch.nn.

    Raises:
        ValueError: such a module is in the model, or one that was parametrized since; nothing is
            changed.

    """
    for name, module in model.named_modules():
        if is_parametrized(module) and isinstance(module, tuple(nn.ORIGINALS)):
            raise ValueError(
                f"{name or 'the model'} is a {type(module).__name__}, parametrized since; remove its "
                "parametrizations first"
            )
    modules = [(name, m) for name, m in model.named_modules() if type(m) in nn.ORIGINALS]
    for name, module in modules:
        option: str | None = module._beyond_torch()
        if option is not None:
            raise ValueError(
                f"{name or 'the model'} is a {type(module).__name__} with {option}, "
                "which torch.nn does not have"
            )
    for _, module in modules:
        module.__class__ = nn.ORIGINALS[type(module)]
    return model


def _obstacle(module: torch.nn.Module) -> str | None:
    if type(module) not in _REPLACEMENTS:
        return "a subclass may have changed what it computes"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    return None
