"""Loads the extension, after torch where there is one.

torch's wheel brings an OpenMP runtime, which the extension shares only if it is there first.
"""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("torch") is not None:
    import torch  # noqa: F401

from . import _C

try:
    from . import _cuda
except ImportError:  # built without CUDA
    _cuda = None  # type: ignore[assignment]

__all__ = ["_C", "_cuda"]
