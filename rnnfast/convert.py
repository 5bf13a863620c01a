"""accelerate and restore: convert a model's recurrent modules to rnnfast's classes and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch.nn.utils.parametrize import is_parametrized

from . import nn

__all__ = ["Entry", "Report", "accelerate", "restore"]

Model = TypeVar("Model", bound=torch.nn.Module)

_RECURRENT = (torch.nn.RNNBase, torch.nn.RNNCellBase)
_REPLACEMENTS = {original: replacement for replacement, original in nn.ORIGINALS.items()}


class Entry(NamedTuple):
    """What ``accelerate`` did with one recurrent module.

    Attributes:
        name: the module's name in the model; "" for the model itself.
        module: the name of the module's class before ``accelerate``.
        replaced: whether the module now has rnnfast's class.
        reason: why the module was replaced or left.
    """

    name: str
    module: str
    replaced: bool
    reason: str


class Report(NamedTuple):
    """What ``accelerate`` did; ``str(report)`` has a line for each recurrent module.

    Attributes:
        entries: an ``Entry`` for each recurrent module of torch.nn, in the order of
            ``model.named_modules()``.
    """

    entries: tuple[Entry, ...]

    def __str__(self) -> str:
        if not self.entries:
            return "rnnfast.accelerate: the model has no recurrent modules of torch.nn"
        count = sum(entry.replaced for entry in self.entries)
        lines = [f"rnnfast.accelerate: replaced {count} of {len(self.entries)} recurrent modules"]
        for entry in self.entries:
            mark = "replaced" if entry.replaced else "left"
            lines.append(f"  {mark:8} {entry.name or '(the model)'}: {entry.module}, {entry.reason}")
        kind = next((entry.module for entry in self.entries if entry.replaced), None)
        if kind is not None:
            lines += [
                f"isinstance(m, torch.nn.{kind}) is still true.",
                f"type(m) is torch.nn.{kind} is now false: code with such a test, for example",
                "an initialiser, must run before accelerate, or after rnnfast.restore(model).",
            ]
        return "\n".join(lines)


def accelerate(model: Model, report: Callable[[Report], object] | None = print) -> Model:
    """Convert the torch.nn RNN, LSTM, GRU and cell modules of ``model`` to rnnfast's classes, in place.

    A module changes only its class. It stays the same object with the same parameters, buffers, hooks
    and name, so existing optimizers and references still work. Three kinds of modules do not change:
    instances of subclasses, modules whose ``forward`` was replaced on the instance, and TorchScript
    modules.

    The new class is a subclass, so ``isinstance(m, torch.nn.LSTM)`` stays true. A test by exact class,
    ``type(m) is torch.nn.LSTM``, is false afterwards: an initialiser with such a test skips the module
    silently. Initialise before ``accelerate``, or between ``restore`` and another ``accelerate``.

    Args:
        model: any module; it may itself be recurrent.
        report: a function that is called with a ``Report``; None means no report.

    Returns:
        ``model`` itself.

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
    """Undo ``accelerate``: convert rnnfast's modules back to torch.nn's classes, in place.

    Instances of subclasses of rnnfast's classes stay as they are.

    torch.nn has no counterpart of a ``GRU`` or ``GRUCell`` with ``reset_after=False``, and none of an
    ``LSTM`` or ``LSTMCell`` with ``coupled_gates=True``.

    Args:
        model: any module; it may itself be recurrent.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: the model has a module without a counterpart, a module of rnnfast with a
            parametrization (``torch.nn.utils.parametrize``), or one whose ``forward`` was replaced on
            the instance. Then no module changes.

    """
    for name, module in model.named_modules():
        if is_parametrized(module) and isinstance(module, tuple(nn.ORIGINALS)):
            raise ValueError(
                f"{name or 'the model'} is a {type(module).__name__}, parametrized since; remove its "
                "parametrizations first"
            )
    modules = [(name, m) for name, m in model.named_modules() if type(m) in nn.ORIGINALS]
    for name, module in modules:
        if "forward" in module.__dict__:
            raise ValueError(
                f"the forward of {name or 'the model'} was replaced on the instance, and may call that "
                f"of rnnfast.{type(module).__name__}; undo that first"
            )
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
