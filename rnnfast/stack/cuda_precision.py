"""Whether a layer of float32 on a CUDA device may use TF32: torch's setting for recurrent layers.

cuDNN's recurrent kernels use TF32 in all their products if ``torch.backends.cudnn.allow_tf32`` is set,
as it is by default. The kernels of this package, and torch's products for them, do the same. torch's
products follow another setting, which is off by default. It is changed while they are computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch


def tf32(dtype: torch.dtype) -> bool:
    """Whether products of a recurrent layer of ``dtype`` may use TF32."""
    if dtype != torch.float32:
        return False
    try:
        return bool(torch.backends.cudnn.allow_tf32)
    except RuntimeError:  # raised if the setting was made by its newer name
        return bool(torch.backends.cudnn.rnn.fp32_precision == "tf32")  # type: ignore[attr-defined]


_MATMUL: Any = torch.backends.cuda.matmul
#: Whether torch has a setting for products on CUDA alone, as since 2.9. The older one also concerns the
#: CPU. A mixture of both is an error in some of torch's functions.
_HAS_OWN_SETTING = hasattr(torch.backends.cudnn, "fp32_precision")


def _setting() -> str:
    return str(_MATMUL.fp32_precision if _HAS_OWN_SETTING else torch.get_float32_matmul_precision())


def _set(value: str) -> None:
    if _HAS_OWN_SETTING:
        _MATMUL.fp32_precision = value
    else:
        torch.set_float32_matmul_precision(value)


def _wanted(uses_tf32: bool) -> str:
    if _HAS_OWN_SETTING:
        return "tf32" if uses_tf32 else "ieee"
    return "high" if uses_tf32 else "highest"


class _Products:
    """Changes the setting while a thread computes products, and restores it after the last thread.

    The setting is the process's, so a product that another thread computes meanwhile follows it too.
    """

    def __init__(self) -> None:
        self._lock, self._users, self._before = Lock(), 0, ""

    @contextmanager
    def __call__(self, dtype: torch.dtype) -> Iterator[None]:
        if dtype != torch.float32:
            yield
            return
        with self._lock:
            if self._users == 0:
                self._before = _setting()
                _set(_wanted(tf32(dtype)))
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    self._restore()

    def _restore(self) -> None:
        if _HAS_OWN_SETTING:
            _set("none")  # follows torch.backends.fp32_precision again, as it may have done before
        if not _HAS_OWN_SETTING or _setting() != self._before:
            _set(self._before)


#: The context for products of a layer of a dtype.
products = _Products()
