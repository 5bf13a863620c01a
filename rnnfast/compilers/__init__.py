"""What torch.compile, torch.export, ONNX, torch.fx and TorchScript see of our modules.

Each of them decides by the class of a module or by the source of its ``forward``, which are ours. So
:func:`install` tells them, in their own modules of torch, what ours are.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
import wrapt

from . import dynamo, fx, onnx, torchscript

__all__ = ["install"]


def install(originals: Mapping[type[torch.nn.Module], type[torch.nn.Module]]) -> None:
    """Tell all of them, those that are not imported yet as soon as they are.

    The environment variable ``RNNFAST_COMPILERS=off`` leaves torch as it is. Then torch.compile breaks
    its graph at our modules, torch.fx traces into them, TorchScript refuses them, and torch.onnx needs
    ``custom_translation_table=rnnfast.onnx.translations()``.

    Args:
        originals: each class, and the one of torch.nn whose place it takes.

    """
    if os.environ.get("RNNFAST_COMPILERS") == "off":
        return
    fx.admit(originals)
    torchscript.admit(originals)
    kinds = tuple(originals)
    wrapt.when_imported(dynamo.BUILDER)(lambda builder: dynamo.admit(builder, kinds))
    wrapt.when_imported(onnx.REGISTRATION)(onnx.add_to)
