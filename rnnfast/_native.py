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
_cuda = None
#: Why the CUDA extension cannot be loaded; None if it is loaded, or was not built.
cuda_error = None
try:
    _cuda = importlib.import_module("._cuda", __package__)
except ModuleNotFoundError:  # rnnfast was built without CUDA
    pass
except ImportError as error:  # of another libc, for example
    cuda_error = str(error)

__all__ = ["_C", "_cuda", "cuda_error"]
