"""The extension. Arguments typed Memory are torch CPU tensors or buffers such as NumPy arrays."""

from collections.abc import Callable, Sequence
from typing import Any

Memory = Any

class Packed:
    """The packed weights of a stack."""

    def is_of(self, weights: list[Any], /) -> bool: ...

#: ``(x, h0, c0, weights, sizes, reset)``; stack.config.Inputs says what they are.
Inputs = tuple[Any, Any, Any, Sequence[Any], Any, Any]

class Stack:
    """A stack of layers; csrc/core/call.h says what each argument means."""

    def __init__(
        self,
        *,
        cell: int,  # its number in the table of cells
        single: bool = False,
        reverse: bool = False,
        **config: Any,  # the other fields of stack.config.StackConfig
    ) -> None: ...
    def forward(
        self,
        threads: int,
        inputs: Inputs,
        outputs: tuple[Memory | None, ...],  # y, h_n, c_n, cell_states, saved
        /,
    ) -> None: ...
    def call(
        self,
        types: tuple[type, ...],
        threads: int,
        inputs: Inputs,
        save: Callable[[Block], Any] | None,
        packed: Packed | None,
        /,
    ) -> tuple[Any, Any, Any, Any, Any] | None: ...
    def call_module(
        self,
        types: tuple[type, ...],
        threads: int,
        inputs: tuple[Any, ...],  # x, hx, parameters, names, sizes, reset
        dims: int,
        features: Any,
        packed: Packed | None,
        /,
    ) -> Any: ...
    def backward(
        self,
        threads: int,
        inputs: Inputs,
        y: Memory,
        saved: Memory,
        given: tuple[Memory | None, ...],  # dy, dh_n, dc_n, dcell_states
        wanted: tuple[Any, ...],  # dx, dh0, dc0, dweights
        /,
    ) -> None: ...
    def pack(self, x: Memory, weights: list[Any], /) -> Packed: ...
    def new_saved(self, dtype: str, rows: int, hidden: int, outputs: int, /) -> Block: ...

class Block:
    """A buffer of uninitialised bytes."""

    def __buffer__(self, flags: int, /) -> memoryview: ...

def release_memory() -> None: ...
def cells() -> list[dict[str, Any]]:
    """The fields of cell_table.Cell, for each cell in the order of their numbers."""

def isa() -> str: ...
def supported_isas(dtype: str = "") -> list[str]:
    """What was built and this machine can run, the best last.

    Args:
        dtype: only those that have kernels of their own for ``float32``, ``float64`` or ``bfloat16``.
    """

def force_isa(isa: str, /) -> None:
    """For tests: the instruction set of every call of the process from now on; "" for the first one.

    Bits differ between instruction sets. No call may run meanwhile, and backward must run in the
    instruction set of its forward call.

    Raises:
        ValueError: it was not built, or this machine cannot run it.
    """

def build_info() -> dict[str, Any]: ...
def max_threads() -> int: ...
def force_partition(partition: str, /, oversubscribe: bool = False) -> None:
    """For tests and benchmarks: how every call of the process is shared among threads from now on,
    wherever it can be. No partition changes a bit.

    Args:
        partition: ``chosen`` (by the cost model), ``one`` thread, ``rows`` of the batch, hidden
            ``units``, the two ``directions``, or a ``wavefront`` over layers.
        oversubscribe: also among more threads than there are processors, up to four times as many.

    Raises:
        ValueError: the partition is none of these.
    """

def used_partition() -> tuple[str, int]:
    """How the process's last call was shared, and among how many threads."""

def peak_flops(dtype: str, threads: int, seconds: float, /) -> float: ...
