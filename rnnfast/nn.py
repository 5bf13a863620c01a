"""LSTM, GRU, RNN and their cells, as subclasses of torch.nn's.

A call that the kernels cover runs on them, one under a transform of torch.func on torch's operators.
Any other (another device, bad input) runs torch's own ``forward``, so its answers and exceptions are
torch's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import autograd, checks, dynamo, functional, fx, onnx, ops, packing, script, sequences

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"]

State = Tensor | tuple[Tensor, Tensor] | None


def _states(hx: Any, is_lstm: bool) -> Any:
    """``h0`` and ``c0``, or None where ``hx`` is not of the kind that it must be."""
    if hx is None:
        return None, None
    if not is_lstm:
        return (hx, None) if type(hx) in checks.PLAIN_TYPES else None
    if type(hx) not in (tuple, list) or len(hx) != 2:
        return None
    plain = type(hx[0]) in checks.PLAIN_TYPES and type(hx[1]) in checks.PLAIN_TYPES
    return hx if plain else None


#: Of each mode of torch.nn.RNNBase.
_CELLS = {"LSTM": "lstm", "GRU": "gru", "RNN_TANH": "rnn_tanh", "RNN_RELU": "rnn_relu"}


def _is_uneven(batch_sizes: Tensor) -> bool:
    """Whether the rows of a packed sequence differ in length."""
    return len(batch_sizes) > 0 and bool(batch_sizes[0] != batch_sizes[-1])


class _Recurrent(torch.nn.RNNBase):
    """What the three modules share. It adds no state: a torch.nn module can become one in place."""

    def __init__(self, *args: Any, device: Any = None, **kwargs: Any) -> None:
        if device is not None:  # a parameter, since torch.nn.utils.skip_init looks for one
            kwargs["device"] = device
        super().__init__(*args, **kwargs)

    def _cell(self) -> str:
        return _CELLS[self.mode]

    # Not keyword-only: torch.onnx's older exporter hands over all arguments in order.
    def forward(
        self,
        input: Any,
        hx: Any = None,
        lengths: Any = None,
        reset: Any = None,
        return_cells: bool = False,
    ) -> Any:
        """As torch's ``forward``, with three more arguments, best given by name.

        Args:
            input: ``[T, B, I]`` (``[B, T, I]`` with ``batch_first``), ``[T, I]``, or a PackedSequence.
            hx: as torch's.
            lengths: ``[B]`` integers in any order, on the CPU, from 0 to T: how many steps of each row
                of a padded batch are real. Only they are computed. The output is zero past them, and so
                is the gradient of the input. The final states are those of each row's last step (in
                reverse, its first); those of a row of length 0 are its initial ones. Under autocast
                the results have the dtypes of a padded batch. In torch.compile give a tensor: one graph
                takes any, whereas each list is compiled anew.
            reset: bools, ``[T, B]`` (``[B, T]`` with ``batch_first``), ``[T]`` where there is no batch:
                where true, the row's states are zero before that step, in every layer, and no gradient
                passes there: the ``done`` flags of reinforcement learning. The reversed direction takes
                its steps from the last to the first, and its states are zero before it takes step t.
                For a PackedSequence one of bools packed alike, or padded as above.
            return_cells: LSTM only; return ``(output, (h_n, c_n), cells)``, with the cell states that
                belong to ``output`` at every step, ``[T, B, D * H]`` or laid out as ``output`` is.
        """
        if lengths is not None:
            lengths = sequences.lengths_of(input, lengths, self.batch_first)
        if type(input) is Tensor and checks.plain_call() and not checks.may_autocast():
            outputs = self._forward_directly(input, hx, lengths, reset, return_cells)
            if outputs is not None:
                return outputs
        if return_cells and self.mode != "LSTM":
            raise ValueError(f"return_cells needs an LSTM; {type(self).__name__} has no cell state")
        if lengths is not None:
            return self._forward_padded(input, hx, lengths, reset, return_cells)
        if reset is not None or return_cells:
            return self._forward_further(input, hx, reset, return_cells)
        return self._forward_as_torch(input, hx)

    def _forward_as_torch(self, input: Any, hx: Any) -> Any:
        """What torch.nn offers too."""
        if not checks.traced():
            self._update_flat_weights()
        outputs = self._run(input, hx, fused=True) if self._covers(input, hx) else None
        return self._uncovered(input, hx) if outputs is None else outputs

    def _uncovered(self, input: Any, hx: Any) -> Any:
        """What no kernel covers, bad input included: torch's own answer, or its exception.

        But torch's own recurrent operators know neither vmap nor, all of them, forward mode.
        """
        if checks.transformed() and self._fitting(input, hx) is not None:
            return self._run(input, hx, fused=False)
        return super().forward(input, hx)

    def _forward_further(self, input: Any, hx: Any, reset: Any, cells: bool) -> Any:
        """What torch.nn does not offer; on torch's operators where the kernels do not cover it."""
        if not checks.traced():
            self._update_flat_weights()
        covered = self._covers(input, hx)
        if not covered and (checks.plain_call() or self._fitting(input, hx) is None):
            # torch knows what is wrong with the other arguments.
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                super().forward(input, hx)
        if reset is not None:
            reset = sequences.reset_rows(input, reset, self.batch_first)
        outputs = self._run(input, hx, fused=True, reset=reset, cells=cells) if covered else None
        if outputs is None:
            outputs = self._run(input, hx, fused=False, reset=reset, cells=cells)
        return outputs

    def _forward_directly(
        self, input: Tensor, hx: Any, lengths: Tensor | None, reset: Any, cells: bool
    ) -> Any:
        """The usual call, at the least cost; None, having done nothing, where it is another."""
        if self.training and self.num_layers > 1 and self.dropout > 0:
            return None
        spec = self._spec(ops.spec)
        names, parameters = self._flat_weights_names, self._parameters
        if not torch.is_grad_enabled():
            packed = packing.packed(self, spec, names) if packing.HELD else None
            features = self.input_size
            return ops.call_module(
                spec, lengths, input, 3, features, hx, parameters, names, reset, cells, packed
            )
        try:
            weights = [parameters[name] for name in names]
        except KeyError:  # computed at each access (a parametrization)
            return None
        if input.is_nested or input.dim() != 3 or input.size(2) != self.input_size:
            return None
        is_lstm = self.mode == "LSTM"
        pair = _states(hx, is_lstm)
        if pair is None or (cells and not is_lstm):
            return None
        h0, c0 = pair
        outputs = autograd.stack(spec, lengths, input, h0, c0, weights, reset, cells)
        if outputs is None:
            return None
        y, h_n, c_n, every_c, _ = outputs
        if not is_lstm:
            return y, h_n
        return (y, (h_n, c_n), every_c) if cells else (y, (h_n, c_n))

    def _weights(self) -> list[Any]:
        if checks.traced():
            return [getattr(self, name) for name in self._flat_weights_names]
        return self._flat_weights

    def _spec(self, make: Callable[..., ops.Spec] = ops.Spec) -> ops.Spec:
        directions, projected = 2 if self.bidirectional else 1, self.proj_size > 0
        return make(self._cell(), self.num_layers, directions, self.bias, projected, self.batch_first)

    def _forward_padded(
        self, input: Tensor, hx: State, lengths: Tensor, reset: Any, cells: bool
    ) -> Any:
        """A padded batch with lengths; packed where only torch's own layers take it."""
        if reset is not None:
            reset = sequences.reset_rows(input, reset, self.batch_first)
        if not checks.traced():
            self._update_flat_weights()
        if not input.is_cuda and self._covers(input, hx):
            outputs = self._run(input, hx, fused=True, lengths=lengths, reset=reset, cells=cells)
            if outputs is not None:
                return outputs
        if checks.transformed() and self._fitting(input, hx) is not None:
            return self._run(input, hx, fused=False, lengths=lengths, reset=reset, cells=cells)

        def run(packed: PackedSequence, hx: Any, reset: PackedSequence | None) -> Any:
            if reset is not None or cells:
                return self._forward_further(packed, hx, reset, cells)
            return self._forward_as_torch(packed, hx)

        return sequences.by_packing(run, input, hx, lengths, reset, self.batch_first)

    def _covers(self, input: Any, hx: Any) -> bool:
        if not (checks.traced() or checks.plain_call()):
            return False
        fitting = self._fitting(input, hx)
        if fitting is None or self._precision(*fitting) is None:
            return False
        return ops.takes(self._spec(), fitting[0], self.hidden_size)

    def _fitting(self, input: Any, hx: Any) -> tuple[Tensor, tuple[Any, ...], Tensor | None] | None:
        """The data, the states, and batch_sizes, if shapes fit; None if not."""
        batch: int | None
        batch_sizes = None
        if isinstance(input, PackedSequence):
            data, batched, batch_sizes = input.data, True, input.batch_sizes
            batch = sequences.known_batch(input, hx)
            right = data.dim() == 2 and checks.packs(input.batch_sizes, data.size(0))
        elif isinstance(input, Tensor):
            data, batched = input, input.dim() == 3
            batch = input.size(0 if self.batch_first else 1) if batched else 0
            # No steps at all: torch says so.
            right = input.dim() in (2, 3) and input.size(1 if batched and self.batch_first else 0) > 0
        else:
            return None
        if not right or data.size(-1) != self.input_size:
            return None
        states: tuple[Any, ...] = ()
        if hx is not None:
            states = hx if self.mode == "LSTM" else (hx,)
            if not isinstance(states, tuple | list) or len(states) != (2 if self.mode == "LSTM" else 1):
                return None
            layers = self.num_layers * (2 if self.bidirectional else 1)
            widths = (self.proj_size or self.hidden_size, self.hidden_size)
            for state, width in zip(states, widths, strict=False):
                shape = (layers, batch, width) if batched else (layers, width)
                if not isinstance(state, Tensor) or state.shape != shape:
                    return None
        return data, (*states,), batch_sizes

    def _precision(
        self, data: Tensor, states: Any, batch_sizes: Tensor | None
    ) -> checks.Precision | None:
        # What torch computes from products alone, and what it runs through oneDNN, autocast lowers.
        one_dnn = self.proj_size == 0 and data.dtype != torch.float16
        if checks.autocasts() and self.mode == "LSTM":  # else it is all the same, and no graph need ask
            one_dnn = one_dnn and (batch_sizes is None or not _is_uneven(batch_sizes))
        lowered = one_dnn or self.proj_size > 0 if self.mode == "LSTM" else self.mode.startswith("RNN")
        return checks.precision(data, states, self._weights(), lowered, one_dnn)

    def _run(
        self,
        input: Any,
        hx: State,
        *,
        fused: bool,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        cells: bool = False,
    ) -> Any:
        """Whatever :meth:`_covers` accepts; with ``fused=False`` in torch's operators."""
        batch_sizes = order = back = None
        if lengths is not None and not fused:
            sequences.check_lengths(lengths, input.size(1 if self.batch_first else 0))
        data, batched = input, True
        if isinstance(input, PackedSequence):
            data, batch_sizes, order, back = input
        elif input.dim() == 2:
            rows = 0 if self.batch_first else 1
            data, batched = input.unsqueeze(rows), False
            reset = reset if reset is None else reset.unsqueeze(rows)
        h0, c0 = (None, None) if hx is None else hx if isinstance(hx, tuple | list) else (hx, None)
        precision = self._precision(data, (h0, c0), batch_sizes)
        if not batched:
            h0, c0 = (s if s is None else s.unsqueeze(1) for s in (h0, c0))
        if order is not None:
            h0, c0 = (s if s is None else s.index_select(1, order) for s in (h0, c0))
        batch: Any = None
        if batch_sizes is not None and checks.traced():
            batch = sequences.known_batch(input, hx)
            batch = batch_sizes[0].item() if batch is None else batch
        outputs = functional.recurrent_in(
            precision,
            self._spec(),
            *(ops.rows(data), ops.rows(h0), ops.rows(c0)),  # type: ignore[arg-type]
            [ops.rows(w) for w in self._weights()],
            dropout=self.dropout if self.training else 0.0,
            sizes=batch_sizes if lengths is None else lengths,
            batch=batch,
            reset=reset,
            cells=cells,
            fused=fused,
        )
        if outputs is None:
            return None
        y: Any
        every_c: Any
        y, h_n, c_n, every_c, _ = outputs
        if batch_sizes is not None:
            if back is not None:
                h_n, c_n = (s if s is None else s.index_select(1, back) for s in (h_n, c_n))
            y = PackedSequence(y, batch_sizes, order, back)
            if cells:
                every_c = PackedSequence(every_c, batch_sizes, order, back)
        elif not batched:
            y = y.squeeze(0 if self.batch_first else 1)
            every_c = every_c.squeeze(0 if self.batch_first else 1) if cells else None
            h_n, c_n = (s if s is None else s.squeeze(1) for s in (h_n, c_n))
        if self.mode != "LSTM":
            return y, h_n
        return (y, (h_n, c_n), every_c) if cells else (y, (h_n, c_n))


class RNN(_Recurrent, torch.nn.RNN):
    """:class:`torch.nn.RNN` on fused kernels; the same constructor, state and behaviour."""


class LSTM(_Recurrent, torch.nn.LSTM):
    """:class:`torch.nn.LSTM` on fused kernels; the same constructor, state and behaviour."""


class _ResetAfter(torch.nn.Module):
    """What the GRU and its cell share: the keyword that chooses between the two forms."""

    reset_after: bool = True

    def __init__(self, *args: Any, reset_after: bool = True, device: Any = None, **kwargs: Any) -> None:
        if not isinstance(reset_after, bool):
            raise TypeError(f"reset_after should be of type bool, got: {type(reset_after).__name__}")
        if device is not None:
            kwargs["device"] = device
        super().__init__(*args, **kwargs)
        if not reset_after:
            self.reset_after = False

    def _cell(self) -> str:
        return "gru" if self.reset_after else "gru_original"

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.reset_after else ", reset_after=False")


class GRU(_ResetAfter, _Recurrent, torch.nn.GRU):
    """:class:`torch.nn.GRU` on fused kernels; the same constructor, state and behaviour.

    One more keyword, ``reset_after`` (Keras's name). True, the default, is torch's and cuDNN's GRU:
    ``n = tanh(W_in x + b_in + r * (W_hn h + b_hn))``. False is the original one (Cho et al. 2014,
    arXiv 1406.1078, eq. 8): ``n = tanh(W_in x + b_in + W_hn (r * h) + b_hn)``. Both have the same
    parameters.
    """

    def _uncovered(self, input: Any, hx: Any) -> Any:
        if self.reset_after:
            return super()._uncovered(input, hx)
        return self._forward_further(input, hx, None, False)


#: Of a cell, without and with biases.
_CELL_WEIGHTS = (("weight_ih", "weight_hh"), ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))


class _RecurrentCell(torch.nn.RNNCellBase):
    """What the three cells share: one step, ``[B, I]`` or ``[I]``."""

    def _cell(self) -> str:
        raise NotImplementedError

    def forward(self, input: Any, hx: Any = None) -> Any:
        """As torch's ``forward``."""
        if type(input) is Tensor and checks.plain_call() and not checks.may_autocast():
            outputs = self._forward_directly(input, hx)
            if outputs is not None:
                return outputs
        outputs = self._run(input, hx, fused=True) if self._covers(input, hx) else None
        return self._uncovered(input, hx) if outputs is None else outputs

    def _uncovered(self, input: Any, hx: Any) -> Any:
        """As that of the layers."""
        if checks.transformed() and self._fitting(input, hx) is not None:
            return self._run(input, hx, fused=False)
        return super().forward(input, hx)

    def _forward_directly(self, input: Tensor, hx: Any) -> Any:
        """The usual call, at the least cost; None, having done nothing, where it is another."""
        if self.hidden_size < 1:
            return None
        spec = self._spec(ops.spec)
        names, parameters = _CELL_WEIGHTS[spec.bias], self._parameters
        if not torch.is_grad_enabled():
            packed = packing.packed(self, spec, names) if packing.HELD else None
            features = self.input_size
            return ops.call_module(
                spec, None, input, 2, features, hx, parameters, names, None, False, packed
            )
        try:
            weights = [parameters[name] for name in names]
        except KeyError:  # computed at each access (a parametrization)
            return None
        if input.is_nested or input.dim() != 2 or input.size(1) != self.input_size:
            return None
        pair = _states(hx, spec.cell == "lstm")
        if pair is None:
            return None
        h0, c0 = pair
        outputs = autograd.stack(spec, None, input, h0, c0, weights)
        if outputs is None:
            return None
        h1, _, c1, _, _ = outputs
        return h1 if c1 is None else (h1, c1)

    def _covers(self, input: Any, hx: Any) -> bool:
        if not (checks.traced() or checks.plain_call()):
            return False
        states = self._fitting(input, hx)
        return states is not None and self._precision(input, states) is not None

    def _fitting(self, input: Any, hx: Any) -> tuple[Any, ...] | None:
        """The states, if all shapes fit; None if not."""
        if not isinstance(input, Tensor) or input.dim() not in (1, 2):
            return None
        if input.size(-1) != self.input_size or self.hidden_size < 1:
            return None
        if hx is None:
            return ()
        states = hx if self._has_c else (hx,)
        if not isinstance(states, tuple | list) or len(states) != (2 if self._has_c else 1):
            return None
        shape = [*input.shape[:-1], self.hidden_size]
        fit = all(isinstance(s, Tensor) and list(s.shape) == shape for s in states)
        return (*states,) if fit else None

    def _precision(self, input: Tensor, states: Any) -> checks.Precision | None:
        lowered = self._cell().startswith("rnn")
        return checks.precision(input, (*states,), self._weights(), lowered, lowered)

    def _spec(self, make: Callable[..., ops.Spec] = ops.Spec) -> ops.Spec:
        return make(self._cell(), 1, 1, bool(self.bias), False, False)  # torch takes any object

    @property
    def _has_c(self) -> bool:
        return self._cell() == "lstm"

    def _weights(self) -> list[Any]:
        if self.bias:
            return [self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh]
        return [self.weight_ih, self.weight_hh]

    def _run(self, input: Tensor, hx: State, *, fused: bool) -> Any:
        """Whatever :meth:`_covers` accepts; with ``fused=False`` in torch's operators."""
        batched = input.dim() == 2
        states = (None, None) if hx is None else hx if isinstance(hx, tuple | list) else (hx, None)
        x, h0, c0 = (t if t is None or batched else t[None] for t in (input, *states))
        outputs = functional.recurrent_in(
            self._precision(input, states),
            self._spec(),
            *(ops.rows(x), ops.rows(h0), ops.rows(c0)),  # type: ignore[arg-type]
            [ops.rows(w) for w in self._weights()],
            fused=fused,
        )
        if outputs is None:
            return None
        h1, c1 = (t if t is None or batched else t[0] for t in (outputs.y, outputs.c_n))
        return h1 if c1 is None else (h1, c1)


class RNNCell(_RecurrentCell, torch.nn.RNNCell):
    """:class:`torch.nn.RNNCell` on fused kernels; the same constructor, state and behaviour."""

    def _cell(self) -> str:
        return f"rnn_{self.nonlinearity}"

    def _fitting(self, input: Any, hx: Any) -> tuple[Any, ...] | None:
        return super()._fitting(input, hx) if self.nonlinearity in ("tanh", "relu") else None


class LSTMCell(_RecurrentCell, torch.nn.LSTMCell):
    """:class:`torch.nn.LSTMCell` on fused kernels; the same constructor, state and behaviour."""

    def _cell(self) -> str:
        return "lstm"


class GRUCell(_ResetAfter, _RecurrentCell, torch.nn.GRUCell):
    """A fused :class:`torch.nn.GRUCell`, with the keyword ``reset_after`` of :class:`GRU`."""

    def _uncovered(self, input: Any, hx: Any) -> Any:
        if self.reset_after:
            return super()._uncovered(input, hx)
        if checks.plain_call():
            with torch.no_grad():  # torch knows what is wrong with the arguments
                super(_RecurrentCell, self).forward(input, hx)
        return self._run(input, hx, fused=False)


#: Each class, and the one of torch.nn whose place it takes.
ORIGINALS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    RNN: torch.nn.RNN,
    LSTM: torch.nn.LSTM,
    GRU: torch.nn.GRU,
    RNNCell: torch.nn.RNNCell,
    LSTMCell: torch.nn.LSTMCell,
    GRUCell: torch.nn.GRUCell,
}

dynamo.admit(_Recurrent)
fx.admit(ORIGINALS)
script.admit(ORIGINALS)
onnx.register()
