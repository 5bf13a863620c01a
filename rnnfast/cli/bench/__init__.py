"""`rnnfast bench`: time rnnfast beside torch.nn and others."""

from .command import add_arguments, run

__all__ = ["add_arguments", "run"]
