"""Which calls on a CUDA device run on the kernels, and by which of the extension's plans."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import wrapt
from torch import Tensor

from .._native import _cuda, cuda_error
from . import cuda_measured, cuda_switch
from .config import CELLS, StackConfig
from .cuda_measured import Kind
from .cuda_precision import tf32

#: The dtypes in which the kernels compute, and their names in the extension.
DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}

#: The largest B * H with which the grid tier is expected to be faster than cuDNN. In every step each
#: block reads B * H values from the L2 cache. cuDNN reads them once for many units, and so is faster
#: where they are many. An estimate: no device has measured it.
MOST_GRID_VALUES = (16 << 10) - 1

#: The largest H for which torch selects cuDNN's persistent kernels in a forward pass without gradients,
#: for cells of one gate and of several. They keep the weights on the chip, as our kernels do. They
#: exist in every dtype but float64.
PERSISTENT_ONE_GATE, PERSISTENT = 384, 192


class Key(NamedTuple):
    """What a plan depends on."""

    device: int
    cell: str
    dtype: torch.dtype
    tf32: bool
    backward: bool
    sizes: tuple[int, int, int]  # hidden units, rows of the batch, directions
    tier: str | None


class Plans(dict[Key, Any]):
    """The extension's plan for each key, made at the first use; None if the device has none."""

    def __init__(self) -> None:
        super().__init__()
        self.devices: dict[int, tuple[str, int]] = {}  # that were asked: capability, multiprocessors

    def __missing__(self, key: Key) -> Any:
        number, dtype = CELLS[key.cell].number, DTYPES[key.dtype]
        plan = None
        try:
            with on_device(key.device):
                plan = _cuda.plan(
                    *(key.device, number, dtype, key.tf32, key.backward, key.sizes, key.tier)
                )
        except refused() as error:
            _warn(key.device, _layer(key), str(error))
            if _passes(str(error)):
                return None  # and ask again next time
        self[key] = plan
        return plan

    def drop(self, plan: Any, reason: str) -> None:
        """Warn that the device refused to run a plan, and use it no more, unless the refusal passes."""
        for key, held in list(self.items()):
            if held is plan:
                _warn(key.device, _layer(key), reason)
                if not _passes(reason):
                    self[key] = None


PLANS = Plans()
#: The devices, and the reasons of their refusals, of which the user was warned.
_WARNED: set[tuple[int, str]] = set()


def refused() -> type[Exception]:
    """The extension's exception for what the device or its driver cannot run."""
    kind: type[Exception] = _cuda.RefusedError
    return kind


def _passes(reason: str) -> bool:
    """Whether a refusal ends by itself: when the program makes the device of the tensors current."""
    return reason.startswith("the current CUDA device is ")


def _layer(key: Key) -> str:
    hidden, rows, _ = key.sizes
    return f"{key.cell} with H={hidden} and B={rows}"


def _warn(device: int, layer: str, reason: str) -> None:
    if (device, reason) in _WARNED:
        return
    _WARNED.add((device, reason))
    warnings.warn(
        f"CUDA device {device} refuses rnnfast's kernels ({layer}), and torch.nn's own code computes "
        f"such layers: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )


def warn_of_loop(what: str, device: torch.device) -> None:
    """Warn once that a call with ``what``, which cuDNN does not have, is slow, and say the cure."""
    if (device.index, what) in _WARNED:
        return
    _WARNED.add((device.index, what))
    cure = "rnnfast.cuda.enable(True) runs it on the CUDA kernels"
    if _cuda is None:
        why = f"cannot be loaded ({cuda_error})"
        if cuda_error is None:
            why = "were not built (cmake.define.RNNFAST_CUDA=ON)"
        cure = f"the CUDA kernels, which {why}, are faster"
    elif cuda_switch.mode() is True:
        cure = "no CUDA kernel takes this layer; `rnnfast info` prints the widest layers"
    warnings.warn(
        f"a layer with {what} runs on {device} as a loop of torch operators, which is about a hundred "
        f"times slower than cuDNN's layers: {cure}",
        RuntimeWarning,
        stacklevel=2,
    )


def on_device(number: int) -> AbstractContextManager[Any]:
    """Torch's guard, which makes a CUDA device current; nothing if it is current."""
    is_initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if not is_initialized or torch.cuda.current_device() == number:
        return nullcontext()
    return torch.cuda.device(number)


class Pair(NamedTuple):
    """The plans of a call: for forward, and with gradients for backward."""

    forward: Any
    backward: Any


def is_on() -> bool:
    """Whether the extension exists, and the switch lets it run."""
    return _cuda is not None and cuda_switch.is_on()


def has_kernels(config: StackConfig, dtype: torch.dtype) -> bool:
    """Whether there are kernels for such a layer, of whatever size."""
    return _cuda is not None and dtype in DTYPES and not config.projected


def plan(config: StackConfig, x: Tensor, hidden: int, batch: int, backward: bool) -> Any:
    """The plan for one pass of a layer; None if the switch is off or no tier fits."""
    if not is_on():
        return None
    return _plan(x.device.index or 0, config, x.dtype, (hidden, batch), backward)


def _plan(
    device: int, config: StackConfig, dtype: torch.dtype, sizes: tuple[int, int], backward: bool
) -> Any:
    tier = cuda_switch.forced_tier()
    all_sizes = (*sizes, config.directions)
    tier = None if tier == "first" else tier
    return PLANS[Key(device, config.cell, dtype, tf32(dtype), backward, all_sizes, tier)]


def plans(
    config: StackConfig, x: Tensor, sizes: tuple[int, int], steps: int, **call: bool
) -> Pair | None:
    """The plans of a call with (H, B) = ``sizes``, or None: torch.nn's own code has to compute it.

    ``steps`` is the number of steps of the longest row. ``call`` says whether the call is in
    ``training`` (backward follows), ``packed``, and ``alone``: has arguments that torch.nn's own code
    lacks.
    """
    if not is_on():
        return None
    device, training = x.device.index or 0, call["training"]
    if cuda_switch.mode() == "auto":
        kind = kind_of(config, x.dtype, training, call["packed"])
        if not cuda_measured.wins(measured_as(device), kind, sizes, steps):
            return None
    forward = _plan(device, config, x.dtype, sizes, False)
    backward = _plan(device, config, x.dtype, sizes, True) if training else None
    if forward is None or (training and backward is None):
        return None
    pair = Pair(forward, backward)
    is_estimated = cuda_switch.mode() != "auto" and cuda_switch.forced_tier() is None
    has_rival = config.is_in_torch and not call["alone"]
    if has_rival and is_estimated and _loses(config, x.dtype, sizes, pair):
        return None
    return pair


def _loses(config: StackConfig, dtype: torch.dtype, sizes: tuple[int, int], pair: Pair) -> bool:
    """Whether cuDNN is expected to be faster."""
    hidden, batch = sizes
    if any(p is not None and p.tier == "grid" for p in pair) and batch * hidden > MOST_GRID_VALUES:
        return True
    persistent = PERSISTENT_ONE_GATE if CELLS[config.cell].weight_blocks == 1 else PERSISTENT
    return pair.backward is None and hidden <= persistent and dtype != torch.float64


def kind_of(config: StackConfig, dtype: torch.dtype, training: bool, packed: bool) -> Kind:
    """The grid of the measured table to which a call belongs."""
    name = "tf32" if tf32(dtype) else DTYPES[dtype]
    return Kind(config.cell, name, training, config.layers, config.directions, packed)


def capability(device: int) -> str:
    """The compute capability of a device, such as "9.0"; "unknown" if its driver refuses to tell."""
    return _facts(device)[0]


def measured_as(device: int) -> str:
    """The name of a device in the measured table."""
    return cuda_measured.key_of(*_facts(device))


def _facts(device: int) -> tuple[str, int]:
    known = PLANS.devices.get(device)
    if known is None:
        try:
            facts = _cuda.device(device)
            number = facts["capability"]
            known = f"{number // 10}.{number % 10}", facts["multiprocessors"]
        except refused() as error:
            _warn(device, "all layers", str(error))
            known = "unknown", 0
        PLANS.devices[device] = known
    return known


def takes(config: StackConfig, x: Tensor, hidden: int) -> bool:
    """Whether there is a batch of this layer for which :func:`plans` returns plans."""
    if not is_on() or not has_kernels(config, x.dtype):
        return False
    return bool(_takes(x.device.index or 0, config, x.dtype, hidden))


def _takes(device: int, config: StackConfig, dtype: torch.dtype, hidden: int) -> bool:
    if cuda_switch.mode() == "auto":
        kinds = [kind_of(config, dtype, t, p) for t in (False, True) for p in (False, True)]
        if not any(cuda_measured.may_win(measured_as(device), kind) for kind in kinds):
            return False
    return all(_plan(device, config, dtype, (hidden, 1), back) is not None for back in (False, True))


# At once, this would import torch._dynamo, which takes a second.
wrapt.when_imported("torch._dynamo")(lambda dynamo: dynamo.assume_constant_result(_takes))


def widest_of_each_tier(device: int, cell: str, dtype: torch.dtype, rows: int) -> dict[str, int]:
    """For each tier the largest H, in steps of 8, whose training runs on the tier."""
    widest: dict[str, int] = {}
    for hidden in range(8, 4096 + 1, 8):
        sizes = (hidden, rows, 1)
        keys = [Key(device, cell, dtype, tf32(dtype), back, sizes, None) for back in (False, True)]
        found = [PLANS[key] for key in keys]
        if None in found:
            break
        widest[found[0].tier] = hidden
    return widest
