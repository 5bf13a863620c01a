"""Loads the extension, after torch where there is one.

torch's wheel brings an OpenMP runtime, which the extension shares only if it is there first.
"""

from __future__ import annotations

import importlib
import importlib.util

if importlib.util.find_spec("torch") is not None:
    importlib.import_module("torch")

_C = importlib.import_module("._C", __package__)
try:
    _cuda = importlib.import_module("._cuda", __package__)
except ImportError:  # built without CUDA
    _cuda = None

__all__ = ["_C", "_cuda"]
