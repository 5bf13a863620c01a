"""How many threads the calls of a test have."""

from __future__ import annotations

import contextlib
import os

import torch

_PROCESSORS = sorted(os.sched_getaffinity(0))
_worker = os.environ.get("PYTEST_XDIST_WORKER")  # gw0, gw1, ...; None in a run without workers
#: The processors for more threads than there are: one beside other workers of pytest.
SHARED = _PROCESSORS if _worker is None else [_PROCESSORS[int(_worker[2:]) % len(_PROCESSORS)]]
_shares = False


def set_threads(number: int) -> None:
    """`torch.set_num_threads`. Beside pytest's other workers too many threads share one processor.

    More threads than processors wait for each other in turn, and a thread that waits yields its
    processor. Where a thread of another worker takes it, each wait lasts a time slice of some
    milliseconds. Two threads of two processors stay as they are: they run side by side.
    """
    global _shares
    shares = number > len(_PROCESSORS)
    if _worker is not None and shares != _shares:
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(OSError):  # it has ended
                os.sched_setaffinity(int(thread), SHARED if shares else _PROCESSORS)
        _shares = shares
    torch.set_num_threads(number)
