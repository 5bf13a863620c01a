"""The extension. Arguments typed Memory are torch CPU tensors or buffers such as NumPy arrays."""

from collections.abc import Callable, Sequence
from typing import Any

Memory = Any

class Packed:
    """The packed weights of a stack."""

    def is_of(self, weights: list[Any], /) -> bool: ...

class Stack:
    """A stack of layers; csrc/stack.h says what each argument means."""

    def __init__(
        self,
        cell: int,
        layers: int,
        directions: int,
        single: bool,
        reverse: bool,
        bias: bool,
        projected: bool,
        batch_first: bool,
        /,
    ) -> None: ...
    def forward(
        self,
        threads: int,
        sizes: Memory | None,  # int64; given, sequences are packed, [rows, features]
        reset: Memory | None,  # bool
        x: Memory,
        h0: Memory | None,
        c0: Memory | None,
        weights: list[Any],
        y: Memory,
        h_n: Memory | None,
        c_n: Memory | None,
        cells: Memory | None,
        saved: Memory | None,
        /,
    ) -> None: ...
    def call(
        self,
        types: tuple[type, ...],
        threads: int,
        sizes: Memory | None,
        reset: Memory | None,
        x: Any,
        h0: Any,
        c0: Any,
        weights: list[Any],
        cells: bool,
        save: Callable[[Block], Any] | None,
        packed: Packed | None,
        /,
    ) -> tuple[Any, Any, Any, Any, Any] | None: ...
    def call_module(
        self,
        types: tuple[type, ...],
        threads: int,
        sizes: Memory | None,
        x: Any,
        dims: int,
        features: Any,
        hx: Any,
        parameters: dict[str, Any],
        names: Sequence[str],
        reset: Memory | None,
        cells: bool,
        packed: Packed | None,
        /,
    ) -> Any: ...
    def pack(self, x: Memory, weights: list[Any], /) -> Packed: ...
    def backward(
        self,
        threads: int,
        sizes: Memory | None,
        reset: Memory | None,
        x: Memory,
        h0: Memory | None,
        c0: Memory | None,
        weights: list[Any],
        y: Memory,
        saved: Memory,
        dy: Memory | None,
        dh_n: Memory | None,
        dc_n: Memory | None,
        dcells: Memory | None,
        dx: Memory | None,
        dh0: Memory | None,
        dc0: Memory | None,
        dweights: list[Any],
        /,
    ) -> None: ...
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
