"""Whether layers on a CUDA device may run on the CUDA kernels: the switch, and the forced tier."""

from __future__ import annotations

import os

from . import cuda_measured

#: The values of the environment variable RNNFAST_CUDA, and the mode that each sets.
_OF_ENVIRONMENT: dict[str, bool | str] = {"1": True, "0": False, "auto": "auto"}
#: The values of RNNFAST_CUDA_TIER. "first" is the first tier that fits a layer.
TIERS = ("block", "cluster", "grid", "first")

_mode: bool | str | None = None  # None: read RNNFAST_CUDA at the first use


def mode() -> bool | str:
    """True, False or "auto", the default.

    Raises:
        ValueError: RNNFAST_CUDA has another value than "1", "0" and "auto".
    """
    global _mode
    if _mode is None:
        value = os.environ.get("RNNFAST_CUDA") or "auto"
        if value not in _OF_ENVIRONMENT:
            raise ValueError(f"RNNFAST_CUDA is {value!r}; expected '1', '0' or 'auto'")
        _mode = _OF_ENVIRONMENT[value]
    return _mode


def set_mode(value: bool | str) -> None:
    """Set the mode, whatever RNNFAST_CUDA says.

    Raises:
        ValueError: ``value`` is not True, False or "auto".
    """
    global _mode
    if not isinstance(value, bool) and value != "auto":
        raise ValueError(f"the mode of the CUDA kernels is {value!r}; expected True, False or 'auto'")
    _mode = value


def is_on() -> bool:
    """Whether there can be a layer that the kernels take."""
    value = mode()
    return value is True or (value == "auto" and bool(cuda_measured.TABLE))


def forced_tier() -> str | None:
    """RNNFAST_CUDA_TIER, or None if it is not set.

    Raises:
        ValueError: it has another value than those of ``TIERS``.
    """
    tier = os.environ.get("RNNFAST_CUDA_TIER")
    if not tier:
        return None
    if tier not in TIERS:
        raise ValueError(
            f"RNNFAST_CUDA_TIER is {tier!r}; expected one of {', '.join(map(repr, TIERS))}"
        )
    return tier
