from . import _C as _C
from . import _cuda as _cuda  # None if rnnfast was built without CUDA

__all__ = ["_C", "_cuda"]
