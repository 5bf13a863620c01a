"""The CUDA extension, where it was built. Memory means torch tensors on the plan's device."""

from typing import Any

Memory = Any

#: products, w_hh, b_hh, h0, c0, y, cell_states, gates, h_n, c_n; for backward then dy, dcell_states,
#: dh_n, dc_n, dgates, dh0, dc0. csrc/cuda/recurrence.h has their shapes, and says which may be None.
Direction = tuple[Memory | None, ...]

class Plan:
    """Who computes what of one layer."""

    @property
    def tier(self) -> str: ...
    @property
    def groups(self) -> int: ...  # slices of the batch, for each direction
    @property
    def blocks(self) -> int: ...  # that share the weights of a group
    @property
    def rows(self) -> int: ...  # of the batch, in a group
    @property
    def chunk(self) -> int: ...  # of these, that a block multiplies at a time
    @property
    def units(self) -> int: ...  # hidden units of a block
    @property
    def shared_bytes(self) -> int: ...  # of shared memory, of a block
    @property
    def workspace_bytes(self) -> int: ...  # of the device's memory, for each run
    def run(
        self,
        stream: int,
        steps: int,
        batch_sizes: Memory | None,  # int64, on the CPU; given, sequences are packed, [rows, features]
        first: Memory | None,  # then room for steps + 1 int64
        reset: Memory | None,  # bool
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
