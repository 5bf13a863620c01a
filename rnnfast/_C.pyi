"""The extension. Arguments typed Memory are torch CPU tensors or buffers such as NumPy arrays."""

from typing import Any

Memory = Any

def forward(
    cell: int,
    reverse: bool,
    threads: int,
    batch_sizes: Memory | None,  # int64; given, sequences are packed, [rows, features]
    inputs: tuple[Memory | None, ...],  # x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr
    outputs: tuple[Memory | None, ...],  # y, h_n, c_n, saved
    /,
) -> None: ...
def backward(
    cell: int,
    reverse: bool,
    threads: int,
    batch_sizes: Memory | None,  # int64; given, sequences are packed, [rows, features]
    inputs: tuple[Memory | None, ...],
    y: Memory,
    saved: Memory,
    grad_outputs: tuple[Memory | None, ...],  # of y, h_n, c_n
    grad_inputs: tuple[Memory | None, ...],  # of x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr
    accumulate_dx: bool,
    /,
) -> None: ...
def infer(
    types: tuple[type, ...],
    cell: int,
    layers: int,
    directions: int,
    bias: bool,
    projected: bool,
    batch_first: bool,
    threads: int,
    x: Memory,
    h0: Memory | None,
    c0: Memory | None,
    weights: list[Any],
    y: Memory,
    h_n: Memory | None,
    c_n: Memory | None,
    /,
) -> bool: ...

class Block:
    """A buffer of uninitialised bytes."""

    def __buffer__(self, flags: int, /) -> memoryview: ...

def new_saved(cell: int, float64: bool, rows: int, hidden: int, /) -> Block: ...
def release_memory() -> None: ...
def cells() -> list[str]: ...
def isa() -> str: ...
def supported_isas() -> list[str]: ...
def build_info() -> dict[str, Any]: ...
def max_threads() -> int: ...
def peak_flops(dtype: str, threads: int, seconds: float, /) -> float: ...
