"""The switch of the CUDA kernels, for layers on a GPU.

torch.nn's own code, cuDNN, computes every layer on a GPU that the CUDA kernels do not take.
"""

from __future__ import annotations

from . import _native
from .stack import cuda_switch

__all__ = ["enable", "mode"]


def enable(mode: bool | str = True, /) -> None:
    """Choose which layers on a GPU run on the CUDA kernels, in the whole process.

    The environment variable ``RNNFAST_CUDA`` (``1``, ``0`` or ``auto``) sets the mode of a process. It
    is read when the process first uses a GPU. The kernels have not run on a device yet: compare results
    before you trust them.

    Args:
        mode (bool | str): True: every layer that fits the device, unless a cost model expects cuDNN to
            be faster. False: none. "auto", the default of a process: layers for which measurements on
            a device of the same architecture and size show that the kernels are faster than cuDNN.
            Their sequences are at least as long as the measured ones. Without a measurement "auto"
            takes no layer.

    Raises:
        ValueError: ``mode`` has another value.
        RuntimeError: ``mode`` is True, and rnnfast was built without the CUDA kernels, or cannot load
            them.
    """
    if mode is True and _native.cuda_error is not None:
        raise RuntimeError(f"rnnfast's CUDA kernels cannot be loaded: {_native.cuda_error}")
    if mode is True and _native._cuda is None:
        raise RuntimeError(
            "rnnfast was built without the CUDA kernels: "
            "pip install . --config-settings=cmake.define.RNNFAST_CUDA=ON builds them"
        )
    cuda_switch.set_mode(mode)


def mode() -> bool | str:
    """The mode that is set: True, False or "auto".

    Raises:
        ValueError: RNNFAST_CUDA has another value than ``1``, ``0`` and ``auto``.
    """
    return cuda_switch.mode()
