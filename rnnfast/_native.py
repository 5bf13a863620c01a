"""Loads the extension, after torch if torch is installed.

torch's wheel contains an OpenMP runtime. The extension shares this runtime only if torch is loaded
first.
"""

from __future__ import annotations

import contextlib
import importlib

with contextlib.suppress(ModuleNotFoundError):
    importlib.import_module("torch")

_C = importlib.import_module("._C", __package__)
try:
    _cuda = importlib.import_module("._cuda", __package__)
except ImportError:  # rnnfast was built without CUDA
    _cuda = None

__all__ = ["_C", "_cuda"]
