"""Keywords of layers and cells that torch.nn's classes lack."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["CoupledGates", "ResetAfter"]


def _check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} should be of type bool, got: {type(value).__name__}")


class ResetAfter(torch.nn.Module):
    """The keyword of GRU and GRUCell that chooses between the two forms of the cell."""

    reset_after: bool = True

    def __init__(self, *args: Any, reset_after: bool = True, device: Any = None, **kwargs: Any) -> None:
        _check_bool("reset_after", reset_after)
        if device is not None:
            kwargs["device"] = device
        super().__init__(*args, **kwargs)
        if not reset_after:
            self.reset_after = False

    def _cell(self) -> str:
        return "gru" if self.reset_after else "gru_original"

    def _beyond_torch(self) -> str | None:
        return None if self.reset_after else "reset_after=False"

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.reset_after else ", reset_after=False")


class CoupledGates(torch.nn.Module):
    """The keyword of LSTM and LSTMCell that couples the input gate to the forget gate."""

    coupled_gates: bool = False

    def __init__(
        self, *args: Any, coupled_gates: bool = False, device: Any = None, **kwargs: Any
    ) -> None:
        _check_bool("coupled_gates", coupled_gates)
        if device is not None:
            kwargs["device"] = device
        super().__init__(*args, **kwargs)
        if coupled_gates:
            self.coupled_gates = True
            self._drop_input_gate()

    def flatten_parameters(self) -> None:
        """As torch's method; with coupled gates nothing, since cuDNN has no such cell."""
        if not self.coupled_gates:
            super().flatten_parameters()  # type: ignore[misc]

    def _drop_input_gate(self) -> None:
        """Remove the first H rows, the input gate's. torch initialises all rows in the same way."""
        for name, parameter in list(self.named_parameters(recurse=False)):
            if not name.startswith("weight_hr"):
                rows = parameter.detach()[len(parameter) // 4 :].clone()
                setattr(self, name, torch.nn.Parameter(rows, parameter.requires_grad))

    def _cell(self) -> str:
        return "lstm_coupled" if self.coupled_gates else "lstm"

    def _beyond_torch(self) -> str | None:
        return "coupled_gates=True" if self.coupled_gates else None

    def extra_repr(self) -> str:
        return super().extra_repr() + (", coupled_gates=True" if self.coupled_gates else "")
