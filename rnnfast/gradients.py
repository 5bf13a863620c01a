"""gradient_flow(model): how large the gradients of the states are at every step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from .stack import flow
from .stack.config import Inputs, StackConfig

__all__ = ["GradientFlow", "Record", "Row", "gradient_flow"]


class Record(NamedTuple):
    """What one backward call of one module recorded."""

    #: The module's name in the model; "" for the model itself. Modules that share weights have all
    #: their names, with commas.
    module: str
    #: The first layer; 0, but where each layer runs alone, as with dropout. Layers that share W_ih and
    #: W_hh have the number of the first of them.
    first_layer: int
    #: float64 ``[layers, directions, T]``: the norm of dL/dh_t over the batch and the units.
    h: torch.Tensor
    #: The same of dL/dc_t; None for cells without a cell state.
    c: torch.Tensor | None


class Row(NamedTuple):
    """One line of :meth:`GradientFlow.table`."""

    module: str
    call: int  # which backward call of the module, in the order of backward
    layer: int
    direction: int  # 1: the reverse direction
    step: int
    h: float
    c: float | None


class GradientFlow:
    """The norms of dL/dh_t and dL/dc_t at every step, of every layer and direction."""

    def __init__(self, model: torch.nn.Module) -> None:
        #: The backward calls, in the order in which they ran.
        self.records: list[Record] = []
        # Names and layer by the addresses of W_ih and W_hh. The weights are kept, so that nothing else
        # gets their addresses.
        self._places: dict[tuple[int, int], tuple[list[str], int]] = {}
        self._weights: list[torch.Tensor] = []
        for name, module in model.named_modules():
            if not isinstance(module, torch.nn.RNNBase | torch.nn.RNNCellBase):
                continue
            parameters = module._parameters  # faster than named_parameters()
            for parameter, w_hh in parameters.items():
                kind, _, layer = parameter.partition("_l")
                w_ih = parameters.get(parameter.replace("_hh", "_ih"))
                if kind != "weight_hh" or layer.endswith("reverse") or w_hh is None or w_ih is None:
                    continue
                self._weights += (w_ih.detach(), w_hh.detach())  # keeps the memory
                place = w_ih.data_ptr(), w_hh.data_ptr()
                names, _ = self._places.setdefault(place, ([], int(layer or 0)))
                if name not in names:
                    names.append(name)

    def add(self, config: StackConfig, inputs: Inputs, norms: flow.Norms) -> None:
        """Take the norms of one backward call; calls with other weights are left out."""
        w_ih, w_hh = inputs.weights[:2]
        place = self._places.get((w_ih.data_ptr(), w_hh.data_ptr()))
        if place is None:
            return
        names, layer = place
        self.records.append(Record(", ".join(names), layer, *norms))

    def table(self) -> list[Row]:
        """All norms as rows, for example for ``pandas.DataFrame``."""
        rows, calls = [], dict[tuple[str, int], int]()
        for record in self.records:
            key = (record.module, record.first_layer)
            call = calls[key] = calls.get(key, -1) + 1
            layers, directions, steps = record.h.shape
            for layer in range(layers):
                for direction in range(directions):
                    for step in range(steps):
                        place = (layer, direction, step)
                        c = None if record.c is None else record.c[place].item()
                        number = record.first_layer + layer
                        norms = (record.h[place].item(), c)
                        rows.append(Row(record.module, call, number, direction, step, *norms))
        return rows

    def _curves(self) -> Iterator[tuple[str, Record]]:
        """The records with their names; the single steps of a cell, or of a layer, as one record."""
        by_place: dict[tuple[str, int], list[Record]] = {}
        for record in self.records:
            by_place.setdefault((record.module, record.first_layer), []).append(record)
        for (module, first_layer), records in by_place.items():
            name = module or "model"
            if len(records) > 1 and all(record.h.size(-1) == 1 for record in records):
                steps = records[::-1]  # backward begins with the last step
                h = torch.cat([step.h for step in steps], -1)
                c = [step.c for step in steps if step.c is not None]
                yield name, Record(module, first_layer, h, torch.cat(c, -1) if c else None)
            elif len(records) == 1:
                yield name, records[0]
            else:
                yield from ((f"{name}, call {call}", record) for call, record in enumerate(records))

    def plot(self, axes: Any = None) -> Any:
        """Draw the norms over the steps, on a logarithmic axis; needs matplotlib.

        Args:
            axes: matplotlib's axes; None makes a figure of its own.

        Returns:
            The axes.

        """
        if axes is None:
            import matplotlib.pyplot as plt

            _, axes = plt.subplots(layout="constrained")
        for name, record in self._curves():
            layers, directions, steps = record.h.shape
            for layer in range(layers):
                for direction in range(directions):
                    label = f"{name}, layer {record.first_layer + layer}"
                    label += ", reverse" if direction else ""
                    for state, norms, style in (("h", record.h, "-"), ("c", record.c, ":")):
                        if norms is not None:
                            y, marker = norms[layer, direction], "." if steps == 1 else None
                            axes.plot(range(steps), y, style, marker=marker, label=f"{label}: {state}")
        axes.set(yscale="log", xlabel="step t", ylabel="norm of the loss's gradient at step t")
        axes.legend()
        return axes


@contextmanager
def gradient_flow(model: torch.nn.Module) -> Iterator[GradientFlow]:
    """Record how large the gradients of the states are, while an ordinary backward runs.

    dL/dh_t is the gradient of the loss with respect to the output h of step t, by all paths: the step's
    own output and all later steps. dL/dc_t is that of the cell state. The norm is over the batch and
    the units. Where it falls as t goes back, gradients vanish (Bengio, Simard and Frasconi 1994); where
    it grows, they explode (Pascanu, Mikolov and Bengio 2013, arXiv 1211.5063).

    The kernels record the norms in their own pass. Forward may run before the context::

        loss = criterion(model(x), target)
        with rnnfast.gradient_flow(model) as flow:
            loss.backward()
        flow.plot()

    Steps past a row's length count as zero. A reset stops the gradient.

    Only a backward of the kernels on the CPU with the module's own weights is recorded. Not recorded
    are modules of torch.nn, other devices, float16, ``create_graph=True``, compiled models, and weights
    that are copies: under autocast, with a parametrization, or in ``torch.func.functional_call``.

    Args:
        model: any module with rnnfast's layers or cells in it.

    Raises:
        RuntimeError: at the end of the context, if no backward call was recorded.

    """
    recorder = GradientFlow(model)
    flow.RECORDERS.append(recorder)
    try:
        yield recorder
    finally:
        flow.RECORDERS.remove(recorder)
    if not recorder.records:
        raise RuntimeError(
            "gradient_flow recorded nothing: in the context the kernels ran no backward with the "
            "weights of this model. The docstring says which calls are not recorded."
        )
