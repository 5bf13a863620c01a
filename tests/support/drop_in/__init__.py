"""What programs do with torch.nn's recurrent modules, as functions of a package and a class."""

from __future__ import annotations

# Each adds its items, in this order.
from . import export, autograd, precision, training, life, more  # isort: skip
from .items import ITEMS, Item, result

__all__ = ["ITEMS", "Item", "autograd", "export", "life", "more", "precision", "result", "training"]
