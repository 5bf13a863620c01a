"""How many threads the calls of a test have."""

from __future__ import annotations

import contextlib
import os

import torch

_PROCESSORS = sorted(os.sched_getaffinity(0))
_worker = os.environ.get("PYTEST_XDIST_WORKER")  # gw0, gw1, ...; None in a run without workers
#: Where more threads than processors run: on one processor if pytest has workers, otherwise on all.
SHARED = _PROCESSORS if _worker is None else [_PROCESSORS[int(_worker[2:]) % len(_PROCESSORS)]]
_shares = False


def set_threads(number: int) -> None:
    """As `torch.set_num_threads`; more threads than processors run on `SHARED`.

    A thread that waits for another one yields its processor. A busy thread of another worker of pytest
    may then take the processor for some milliseconds, at each wait. Threads that share a processor of
    their own yield to each other. Up to one thread for each processor, threads run side by side.
    """
    global _shares
    shares = number > len(_PROCESSORS)
    if _worker is not None and shares != _shares:
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(OSError):  # it has ended
                os.sched_setaffinity(int(thread), SHARED if shares else _PROCESSORS)
        _shares = shares
    torch.set_num_threads(number)
