"""How torch.compile, torch.export, ONNX, torch.fx and TorchScript treat rnnfast's modules.

Each of these compilers decides by the class of a module or by the source of its ``forward``, and does
not know rnnfast's. So :func:`install` wraps functions of torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial

import torch
import wrapt

from . import dynamo, fx, onnx, torchscript

__all__ = ["install"]


def install(originals: Mapping[type[torch.nn.Module], type[torch.nn.Module]]) -> None:
    """Make all compilers accept rnnfast's modules; a compiler that is not imported yet, at its import.

    The environment variable ``RNNFAST_COMPILERS=off`` leaves torch unchanged. Then torch.compile breaks
    the graph at rnnfast's modules, torch.fx traces into them, TorchScript refuses them, and torch.onnx
    needs ``custom_translation_table=rnnfast.onnx.translations()``.

    Args:
        originals: for each class of rnnfast the class of torch.nn that it replaces.

    """
    if os.environ.get("RNNFAST_COMPILERS") == "off":
        wrapt.when_imported("torch._dynamo")(partial(dynamo.leave_out, kinds=tuple(originals)))
        return
    fx.admit(originals)
    torchscript.admit(originals)
    kinds = tuple(originals)
    wrapt.when_imported(fx.QUANTIZATION)(partial(fx.admit_in_quantization, kinds=originals))
    wrapt.when_imported(dynamo.BUILDER)(lambda builder: dynamo.admit(builder, kinds))
    wrapt.when_imported(onnx.REGISTRATION)(onnx.add_to)
