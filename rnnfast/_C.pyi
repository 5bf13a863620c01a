"""The extension. A Memory is a torch CPU tensor, or a buffer such as a NumPy array."""

from collections.abc import Callable, Sequence
from typing import Any

Memory = Any

class Packed:
    """The packed weights of a stack."""

    def is_of(self, weights: list[Any], /) -> bool:
        """Whether the weights, biases aside, are at the addresses from which they were packed."""

#: ``(x, h0, c0, weights, sizes, reset)``; stack.config.Inputs describes them.
Inputs = tuple[Any, Any, Any, Sequence[Any], Any, Any]

class Stack:
    """A stack of layers; csrc/core/call.h describes the arguments."""

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
        inputs: tuple[Any, ...],  # x, hx, parameters, names, sizes, reset, flat
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
        # dx, dh0, dc0, dweights; float64 [layers, directions, T] for the norms of dL/dh_t and dL/dc_t
        wanted: tuple[Any, ...],
        /,
    ) -> None: ...
    def pack(self, x: Memory, weights: list[Any], /) -> Packed: ...
    def new_saved(self, dtype: str, rows: int, hidden: int, outputs: int, /) -> Block:
        """Memory for what forward saves; ``rows`` is T * B, ``hidden`` is H, ``outputs`` is R."""

class Block:
    """A buffer of uninitialised bytes."""

    def __buffer__(self, flags: int, /) -> memoryview: ...

def generate(
    stack: Stack,
    threads: int,
    model: tuple[Any, ...],
    state: tuple[Any, ...],
    sampling: tuple[Any, ...],
    uniforms: Any,
    outputs: tuple[Any, ...],
    /,
) -> None:
    """The loop of :func:`rnnfast.generate`, from the last output of the prompt on.

    Args:
        stack: of one direction.
        threads: the most threads.
        model: ``(weights, embedding, head_w, head_b)``: a list in torch's order, ``[V, I]`` or None for
            one-hot inputs, ``[V, R]``, and ``[V]`` or None.
        state: ``(y, h, c)``: ``[B, R]``, ``[L, B, R]``, and ``[L, B, H]`` or None. The last states
            overwrite them.
        sampling: ``(temperature, top_k, top_p, stop)``: top_k 0, top_p 1 and stop -1 mean none.
        uniforms: float64 ``[steps, B]``.
        outputs: ``(tokens, lengths, log_probs)``: int64 ``[B, steps]``, int64 ``[B]``, float64 ``[B]``.

    Raises:
        ValueError: a size or a number does not fit.
        TypeError: a dtype does not fit.
        RuntimeError: the scores are not numbers.
    """

def beam_search(
    stack: Stack,
    threads: int,
    model: tuple[Any, ...],
    state: tuple[Any, ...],
    search: tuple[Any, ...],
    outputs: tuple[Any, ...],
    /,
) -> None:
    """The loop of :func:`rnnfast.beam_search`, from the last output of the prompt on.

    Args:
        stack: as for :func:`generate`.
        threads: as for :func:`generate`.
        model: as for :func:`generate`.
        state: as for :func:`generate`; the states are only read.
        search: ``(beams, stop, length_penalty)``.
        outputs: ``(tokens, lengths, scores)``: int64 ``[B, beams, steps]``, int64 and float64
            ``[B, beams]``.

    Raises:
        ValueError: as for :func:`generate`.
        TypeError: as for :func:`generate`.
        RuntimeError: as for :func:`generate`.
    """

def release_memory() -> None: ...
def cells() -> list[dict[str, Any]]:
    """The fields of cell_table.Cell of each cell, in the order of the cells' numbers."""

def isa() -> str: ...
def supported_isas(dtype: str = "") -> list[str]:
    """The instruction sets that were built and that this machine can run, the best last.

    Args:
        dtype: ``float32``, ``float64`` or ``bfloat16``: only the instruction sets with kernels of their
            own for this dtype. "" means all.
    """

def force_isa(isa: str, /) -> None:
    """For tests: set the instruction set of all later calls of the process; "" means the initial one.

    Bits differ between instruction sets. No call may run at the same time, and backward must run in
    the instruction set of its forward call.

    Raises:
        ValueError: the instruction set was not built, or this machine cannot run it.
    """

def force_float32_parts(parts: int, /) -> None:
    """For tests: set how many bfloat16 numbers a float32 is split into for a matrix unit.

    Bits differ between numbers of parts, and backward must use that of its forward call.

    Args:
        parts: 1 to 3; 0 means float32 multiply-adds; a negative number: as the precision decides.

    Raises:
        ValueError: more than 3 parts.
    """

def build_info() -> dict[str, Any]: ...
def max_threads() -> int: ...
def force_partition(partition: str, /, oversubscribe: bool = False) -> None:
    """For tests and benchmarks: set how all later calls of the process are shared among threads.

    A call that this partition cannot share uses another one. No partition changes a bit of a result.

    Args:
        partition: ``chosen`` (by the cost model), ``one`` thread, ``rows`` of the batch, hidden
            ``units``, the two ``directions``, or a ``wavefront`` over layers.
        oversubscribe: allow eight threads, or four for each processor where that is more.

    Raises:
        ValueError: the partition is not one of these.
    """

def used_partition() -> tuple[str, int]:
    """The partition and the number of threads of the last call of the process."""

def units() -> list[str]:
    """The units that multiply in the chosen instruction set.

    ``float32``, ``float64`` and ``bfloat16`` are vectors of these dtypes. ``matrix`` is the matrix
    unit, where there is one.
    """

def product_unit(dtype: str, precision: int, hidden: int, /) -> tuple[str, int, int]:
    """The unit that multiplies in a layer.

    Args:
        dtype: ``float32``, ``float64`` or ``bfloat16``.
        precision: as that of :class:`Stack`.
        hidden: the layer's number of hidden units.

    Returns:
        unit: its name.
        products: how many products it computes for each product of the layer: more than one of a
            float32 in several bfloat16 parts.
        bytes: of a packed weight.
    """

def peak_flops(unit: str, threads: int, seconds: float, /) -> float:
    """The measured peak of a unit's multiply-adds, in operations a second.

    Raises:
        ValueError: the chosen instruction set has no such unit.
    """

def product_rate(
    cell: int, dtype: str, precision: int, batch: int, hidden: int, threads: int, seconds: float, /
) -> float:
    """The operations a second of a step's recurrent products, without the cell's formula.

    The threads share the units. A number of a sum counts two operations, whatever unit multiplies.

    Args:
        precision: as that of :class:`Stack`.
        batch: the rows of the states.
        hidden: the layer's number of hidden units.

    Raises:
        ValueError: there is no such cell, or ``batch`` or ``hidden`` is not from 1 to 2**20.
    """

def formula_rate(cell: int, dtype: str, backward: bool, threads: int, seconds: float, /) -> float:
    """How often a second the formula of a cell is computed, for one unit of one row and one step.

    Measured on numbers in the first-level cache.
    """

def read_rate(bytes: int, threads: int, seconds: float, /) -> float:
    """The bytes a second of threads that read ``bytes`` bytes each, their own, again and again.

    Raises:
        ValueError: ``bytes`` is not a multiple of 64.
    """
