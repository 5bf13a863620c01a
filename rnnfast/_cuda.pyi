"""The CUDA extension, if it was built. A Memory is a torch tensor on the plan's device."""

from typing import Any

Memory = Any

#: products, w_hh, b_hh, h0, c0, y, cell_states, gates, h_n, c_n; in backward also dy, dcell_states,
#: dh_n, dc_n, dgates, dh0, dc0. csrc/cuda/recurrence.h has the shapes, and says which may be None.
Direction = tuple[Memory | None, ...]

class RefusedError(RuntimeError):
    """The device or its driver cannot run a kernel. Nothing has happened."""

class Plan:
    """How one layer is divided among thread blocks; csrc/cuda/recurrence.h describes the fields."""

    @property
    def tier(self) -> str: ...
    @property
    def groups(self) -> int: ...  # groups of blocks for each direction; each has a slice of the batch
    @property
    def blocks(self) -> int: ...  # thread blocks in a group, which share the weights
    @property
    def rows(self) -> int: ...  # rows of the batch in a group
    @property
    def chunk(self) -> int: ...  # rows that a block multiplies at a time
    @property
    def units(self) -> int: ...  # hidden units in a block
    @property
    def shared_bytes(self) -> int: ...  # shared memory of a block
    @property
    def workspace_bytes(self) -> int: ...  # device memory for each run
    def run(
        self,
        stream: int,
        steps: int,
        batch_sizes: Memory | None,  # int64 on the CPU, for packed sequences
        first: Memory | None,  # if packed, int64: the rows before each step, and all rows
        reset: Memory | None,  # bool, [T, B] or packed [rows]
        directions: list[Direction],
        workspace: Memory | None,
        /,
    ) -> None: ...

def plan(
    device: int,
    cell: int,
    dtype: str,
    tf32: bool,
    backward: bool,
    sizes: tuple[int, int, int],  # hidden units, rows of the batch, directions
    tier: str | None,
    /,
) -> Plan | None: ...
def device(number: int, /) -> dict[str, Any]: ...
