"""frozen(model): packed weights that are kept from call to call."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from . import checks, ops
from .config import StackConfig
from .precision import Precision

__all__ = ["frozen"]


class _Step:
    """The identity of one optimizer step.

    A hook makes an instance at each step, which torch.compile can trace. Tried: torch.compile cannot
    trace ``object()``, and compiles every step again if there is a counter.
    """


@dataclass(slots=True)
class _Copy:
    """Packed weights and their origin. Threads share an instance, so no field ever changes."""

    packed: Any
    config: StackConfig
    versions: list[int]
    step: _Step  # the last optimizer step before the weights were packed

    def differs(self, config: StackConfig, versions: list[int], step: _Step) -> bool:
        """Whether the weights may have changed, or are of another stack."""
        return self.step is not step or self.versions != versions or self.config != config


@dataclass(slots=True)
class _Converted:
    """Weights in another dtype, and packed. Threads share an instance, so no field ever changes."""

    weights: list[Tensor]
    copy: _Copy
    sources: list[Tensor]  # aliases of the weights; they keep the memory alive, as _Copy.packed does


@dataclass(slots=True)
class _Held:
    """The packed weights of one module."""

    contexts: int  # the number of open contexts of frozen that include the module
    copy: _Copy | None = None
    converted: _Converted | None = None


#: The modules whose packed weights are kept.
HELD: dict[torch.nn.Module, _Held] = {}
_entering_or_leaving = threading.Lock()
_latest_step = _Step()


def _note_step(*_: Any) -> None:
    global _latest_step
    _latest_step = _Step()


@cache
def _watch_optimizers() -> None:
    """Register hooks that note every optimizer step, since a fused step raises no tensor version.

    A step is noted before it begins and after it ends, since it may fail half-way. The hooks are never
    removed: a removal raises an exception in every thread whose optimizer is just calling its hooks.
    """
    register_optimizer_step_pre_hook(_note_step)
    register_optimizer_step_post_hook(_note_step)


@contextmanager
def frozen(model: torch.nn.Module) -> Iterator[None]:
    """Keep the packed weights of rnnfast's modules in ``model`` while the context is open.

    The kernels read weights in an order of their own. Each call packs the weights: it copies them in
    this order. In small calls, above all in single steps of a stream, the packing takes longer than the
    computation. Inside this context the first call packs the weights, and later calls reuse the copies.
    The results are the same to the last bit.

    The context affects only calls without gradients (``torch.no_grad``, ``torch.inference_mode``). The
    copies take as much memory as the weights. Under ``torch.autocast`` the first call also casts the
    weights. The cast weights and their copies take as much memory again.

    If a weight changes, the next call packs the weights again. It notices a change

    - by a step of any ``torch.optim.Optimizer``, also of a fused or compiled one;
    - that raises the version of the weight (``Tensor._version``), as in-place operators do:
      ``weight.mul_``, ``load_state_dict``, ``torch.nn.init``;
    - to another tensor or to other memory: ``module.to``, ``weight.data = tensor``.

    It does not notice a change

    - through ``weight.data`` (``weight.data.mul_``), or through a tensor that was assigned to
      ``weight.data``, as ``torch.nn.utils.vector_to_parameters`` assigns views of its vector;
    - by a new Parameter that replaces the old one and has the same memory;
    - through NumPy, DLPack or the weight's storage, or by another process in shared memory;
    - by an operator that raises no version: ``apply_`` and ``map_``, torch's fused operators outside of
      an optimizer (``torch._fused_adam_``), collective operators of torch.distributed (``all_reduce``,
      ``broadcast``), and some operators of other libraries;
    - in the context of ``torch.autograd._unsafe_preserve_version_counter``, which keeps versions.

    After such a change, enter the context again, or enter another one inside it: the next call then
    packs the weights again.

    Args:
        model: any module; it may itself be recurrent. Modules of torch.nn are not affected.

    """
    modules = [
        module
        for module in model.modules()
        if isinstance(module, torch.nn.RNNBase | torch.nn.RNNCellBase)
    ]
    with _entering_or_leaving:
        _watch_optimizers()
        for module in modules:
            # No copy of an outer context: it may be older than a change that was not noticed.
            HELD[module] = _Held(HELD[module].contexts + 1 if module in HELD else 1)
    try:
        yield
    finally:
        with _entering_or_leaving:
            for module in modules:
                HELD[module].contexts -= 1
                if not HELD[module].contexts:
                    del HELD[module]


def packed(module: torch.nn.Module, config: StackConfig, names: Sequence[str]) -> Any:
    """The module's packed weights; None if it is not frozen, or if gradients are enabled."""
    held = HELD.get(module)
    if held is None or torch.is_grad_enabled():
        return None
    parameters = module._parameters
    try:
        return _packed(held, config, [parameters[name] for name in names])
    except KeyError:  # a parametrization
        return None


def _packed(held: _Held, config: StackConfig, weights: list[Any]) -> Any:
    if config.cell_states:  # packed weights do not depend on it
        config = config._replace(cell_states=False)
    # Versions and step are read before the weights are packed: the next call then notices a change by
    # another thread during the packing.
    step = _latest_step
    try:
        versions = [weight._version for weight in weights]
    except (RuntimeError, AttributeError):
        # A weight from inference mode (without a version), or one that is no tensor.
        return None
    copy = held.copy
    if copy is None or copy.differs(config, versions, step) or not copy.packed.is_of(weights):
        new = ops.pack(config, weights)
        if new is None:
            return None
        copy = held.copy = _Copy(new, config, versions, step)
    return copy.packed


def converted(
    module: torch.nn.Module, config: StackConfig, weights: list[Any], precision: Precision | None
) -> tuple[list[Any], Any]:
    """The module's weights in the dtype of a call of the kernels, and their packed copy.

    Returns ``weights`` themselves and None if no kernel computes the call, if the module is not frozen,
    if gradients are enabled, or if a weight is not a parameter, as a parametrized one.
    """
    if precision is None or checks.traced() or not HELD or torch.is_grad_enabled():
        return weights, None
    held = HELD.get(module)
    if held is None or not all(type(weight) is Parameter for weight in weights):
        return weights, None
    dtype = precision.compute
    if weights[0].dtype == dtype:
        return weights, _packed(held, config, weights)
    if config.cell_states:
        config = config._replace(cell_states=False)
    step = _latest_step
    try:
        versions = [weight._version for weight in weights]
    except RuntimeError:  # a weight from inference mode
        return weights, None
    kept = held.converted
    if (
        kept is None
        or kept.copy.differs(config, versions, step)
        or kept.weights[0].dtype != dtype
        or not all(map(_is_same_memory, kept.sources, weights))
        or not kept.copy.packed.is_of(kept.weights)  # another instruction set
    ):
        sources = [weight.detach() for weight in weights]
        casts = [source.to(dtype) for source in sources]
        new = ops.pack(config, casts)
        if new is None:
            return weights, None
        kept = held.converted = _Converted(casts, _Copy(new, config, versions, step), sources)
    return kept.weights, kept.copy.packed


def _is_same_memory(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.is_set_to(b)
