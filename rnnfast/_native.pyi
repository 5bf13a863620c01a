from . import _C as _C
from . import _cuda as _cuda  # None if rnnfast was built without CUDA, or cannot load it

cuda_error: str | None

__all__ = ["_C", "_cuda", "cuda_error"]
