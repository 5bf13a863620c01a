"""Lets torch.jit.script compile rnnfast's modules.

TorchScript compiles the source of ``forward``, and cannot compile rnnfast's. So rnnfast's modules have
torch.nn's classes while TorchScript compiles them. A scripted program, like a traced one, contains
torch's own operators, needs no rnnfast, and has torch's speed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.jit import _recursive


def admit(originals: Mapping[type[torch.nn.Module], type[torch.nn.Module]]) -> None:
    """Make TorchScript compile an instance of each key as an instance of its value."""
    compile_module: Any = getattr(_recursive, "create_script_module", None)
    if compile_module is None:
        return  # an unknown version of TorchScript, which raises an error itself

    def create_script_module(nn_module: Any, *args: Any, **options: Any) -> Any:
        with _shown_as(originals, nn_module):
            return compile_module(nn_module, *args, **options)

    _recursive.create_script_module = create_script_module


@contextmanager
def _shown_as(
    originals: Mapping[type[torch.nn.Module], type[torch.nn.Module]], model: torch.nn.Module
) -> Iterator[None]:
    kinds = [(m, type(m)) for m in model.modules() if type(m) in originals]
    for module, _ in kinds:
        option: str | None = module._beyond_torch()  # type: ignore[operator]
        if option is not None:
            raise RuntimeError(
                f"torch.jit.script: {type(module).__name__} with {option} is not in torch.nn, "
                "and TorchScript has no operator for it; torch.jit.trace and torch.export work"
            )
    try:
        for module, kind in kinds:
            module.__class__ = originals[kind]
        yield
    finally:
        for module, kind in kinds:
            module.__class__ = kind
