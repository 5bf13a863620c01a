"""frozen(model): packed weights that are held from call to call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import ops

__all__ = ["frozen"]


class _Held:
    """The packed weights of one module, and what they were packed from."""

    def __init__(self) -> None:
        self.packed: Any = None
        self.origin: list[tuple[int, int]] | None = None  # addresses and versions of the weights
        self.memory: list[Tensor] = []  # aliases of them, so that no address is used again


#: The modules whose weights are held.
HELD: dict[torch.nn.Module, _Held] = {}


@contextmanager
def frozen(model: torch.nn.Module) -> Iterator[None]:
    """Hold the packed weights of rnnfast's modules in ``model`` while the context lasts.

    The kernels read weights in an order of their own, and bring them into it at every call. Where calls
    are small, a stream's single steps above all, that costs more than the step itself. In this
    context it happens once. The results are the same to the last bit.

    It concerns calls without gradients (``torch.no_grad``, ``torch.inference_mode``); others run as
    ever. Weights that torch changes in the meantime (an optimizer's step, ``load_state_dict``, ``to``)
    are packed again at the next call. A change that torch does not see, through ``.data``, NumPy or
    another process's shared memory, is not noticed until the context ends. The copies take as much
    memory as the weights.

    Args:
        model: any module; it may itself be recurrent.

    """
    mine = [
        module
        for module in model.modules()
        if isinstance(module, torch.nn.RNNBase | torch.nn.RNNCellBase) and module not in HELD
    ]
    HELD.update((module, _Held()) for module in mine)
    try:
        yield
    finally:
        for module in mine:
            HELD.pop(module, None)


def packed(module: torch.nn.Module, spec: ops.Spec, names: Sequence[str]) -> Any:
    """The module's packed weights for this call, or None where none are held or it has gradients."""
    held = HELD.get(module)
    if held is None or torch.is_grad_enabled():
        return None
    parameters = module._parameters
    try:
        weights: list[Any] = [parameters[name] for name in names]
        origin = [(weight.data_ptr(), weight._version) for weight in weights]
    except (KeyError, RuntimeError, AttributeError):
        # Parametrized; made in inference mode, without versions; or no tensors.
        return None
    if held.origin != origin:
        held.packed, held.origin = ops.pack(spec, weights), origin
        held.memory = [weight.detach() for weight in weights]
    return held.packed
