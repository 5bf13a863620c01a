"""frozen(model): packed weights that are held from call to call."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from . import ops
from .config import StackConfig

__all__ = ["frozen"]


class _Step:
    """A step of an optimizer; only which one it is matters.

    torch.compile can trace that a hook makes one. It cannot trace ``object()``, and a counter makes it
    compile every step anew.
    """


@dataclass(slots=True)
class _Copy:
    """Packed weights, and what they were packed from. No field ever changes: threads share it."""

    packed: Any
    config: StackConfig
    versions: list[int]
    step: _Step  # the latest one before


@dataclass(slots=True)
class _Held:
    """What is held of one module."""

    contexts: int  # how many hold it
    copy: _Copy | None = None


#: The modules whose weights are held.
HELD: dict[torch.nn.Module, _Held] = {}
_entering_or_leaving = threading.Lock()
_latest_step = _Step()


def _note_step(*_: Any) -> None:
    global _latest_step
    _latest_step = _Step()


@cache
def _watch_optimizers() -> None:
    """Note every step: fused ones, and those in another library's kernels, raise no version.

    A step is noted before it begins too, since it may fail half-way. The hooks stay for good: to remove
    a hook raises an exception in a thread that is calling hooks, inside its optimizer's step.
    """
    register_optimizer_step_pre_hook(_note_step)
    register_optimizer_step_post_hook(_note_step)


@contextmanager
def frozen(model: torch.nn.Module) -> Iterator[None]:
    """Hold the packed weights of rnnfast's modules in ``model`` while the context lasts.

    The kernels read weights in an order of their own, and bring them into it at every call. Where calls
    are small, a stream's single steps above all, that costs more than the step itself. In this
    context it happens once. The results are the same to the last bit.

    It concerns calls without gradients (``torch.no_grad``, ``torch.inference_mode``); others run as
    ever. The copies take as much memory as the weights.

    Weights that change in the meantime are packed again at the next call. A change is noticed

    - after a step of any ``torch.optim.Optimizer``, also a fused or a compiled one;
    - where torch raises the version of a weight (``Tensor._version``), as operators in place do:
      ``weight.mul_``, ``load_state_dict``, ``torch.nn.init``;
    - where a weight is another tensor or gets other memory: ``module.to``, ``weight.data = tensor``.

    A change is not noticed where it is made

    - through ``weight.data`` (``weight.data.mul_``), or through a tensor that was assigned to it, as
      ``torch.nn.utils.vector_to_parameters`` assigns parts of its vector;
    - through NumPy, DLPack or the weight's storage, or by another process in shared memory;
    - by an operator that raises no version: ``apply_`` and ``map_``, torch's fused ones outside of an
      optimizer (``torch._fused_adam_``), collective ones of torch.distributed (``all_reduce``,
      ``broadcast``), and some of other libraries;
    - while versions are kept as they are (``torch.autograd._unsafe_preserve_version_counter``).

    After such a change enter the context anew, or another one inside it: that packs the weights again.

    Args:
        model: any module; it may itself be recurrent.

    """
    mine = [
        module
        for module in model.modules()
        if isinstance(module, torch.nn.RNNBase | torch.nn.RNNCellBase)
    ]
    with _entering_or_leaving:
        _watch_optimizers()
        for module in mine:
            # Another context may hold a copy from before a change that was not noticed.
            HELD[module] = _Held(HELD[module].contexts + 1 if module in HELD else 1)
    try:
        yield
    finally:
        with _entering_or_leaving:
            for module in mine:
                HELD[module].contexts -= 1
                if not HELD[module].contexts:
                    del HELD[module]


def packed(module: torch.nn.Module, config: StackConfig, names: Sequence[str]) -> Any:
    """The module's packed weights for this call, or None where none are held or it has gradients."""
    held = HELD.get(module)
    if held is None or torch.is_grad_enabled():
        return None
    if config.cell_states:  # of no matter to the weights
        config = config._replace(cell_states=False)
    # Both are read before the weights are: what changes them meanwhile is noticed at the next call.
    parameters, step = module._parameters, _latest_step
    try:
        weights: list[Any] = [parameters[name] for name in names]
        versions = [weight._version for weight in weights]
    except (KeyError, RuntimeError, AttributeError):
        # Parametrized; made in inference mode, without versions; or no tensors.
        return None
    copy = held.copy
    if (
        copy is None
        or copy.step is not step
        or copy.versions != versions
        or copy.config != config
        or not copy.packed.is_of(weights)
    ):
        fresh = ops.pack(config, weights)
        if fresh is None:
            return None
        copy = held.copy = _Copy(fresh, config, versions, step)
    return copy.packed
