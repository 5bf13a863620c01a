"""LSTM, GRU and RNN, as subclasses of torch.nn's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..stack import checks, ops, precision, sequences
from ..stack.config import Inputs, StackConfig
from ..stack.precision import Precision
from .call import Fitting, Fused, State, returned
from .keywords import CoupledGates, ResetAfter
from .route import recurrent_in

__all__ = ["GRU", "LSTM", "RNN", "Recurrent"]


def _is_uneven(batch_sizes: Tensor) -> bool:
    """Whether the rows of a packed sequence differ in length."""
    return len(batch_sizes) > 0 and bool(batch_sizes[0] != batch_sizes[-1])


class Recurrent(Fused, torch.nn.RNNBase):
    """What the three modules share. It adds no state: a torch.nn module can become one in place."""

    _dims = 3

    def __init__(self, *args: Any, device: Any = None, **kwargs: Any) -> None:
        if device is not None:  # a parameter, since torch.nn.utils.skip_init looks for one
            kwargs["device"] = device
        super().__init__(*args, **kwargs)

    def _cell(self) -> str:
        return self.mode.lower()  # torch's "LSTM", "GRU", "RNN_TANH" or "RNN_RELU"

    def _is_lowered(self, one_dnn: bool) -> bool:
        """Whether autocast lowers torch's layer; ``one_dnn``: whether oneDNN could compute it."""
        return False

    # Not keyword-only: torch.onnx's older exporter hands over all arguments in order.
    def forward(
        self,
        input: Any,
        hx: Any = None,
        lengths: Any = None,
        reset: Any = None,
        return_cell_states: bool = False,
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
            return_cell_states: LSTM only; return ``(output, (h_n, c_n), cell_states)``, with the cell
                states that belong to ``output`` at every step, ``[T, B, D * H]`` or laid out as
                ``output`` is.
        """
        if lengths is not None:
            lengths = sequences.lengths_of(input, lengths, self.batch_first)
        usual = type(input) is Tensor and checks.plain_call() and not precision.may_autocast()
        if usual and not (self.training and self.num_layers > 1 and self.dropout > 0):
            names = self._flat_weights_names
            outputs = self._forward_directly(input, hx, names, lengths, reset, return_cell_states)
            if outputs is not None:
                return outputs
        if return_cell_states and not self._has_c:
            raise ValueError(
                f"return_cell_states needs an LSTM; {type(self).__name__} has no cell state"
            )
        if lengths is not None:
            return self._forward_padded(input, hx, lengths, reset, return_cell_states)
        if reset is not None or return_cell_states:
            return self._forward_further(input, hx, reset, return_cell_states)
        return self._forward_as_torch(input, hx)

    def _refresh(self) -> None:
        if not checks.traced():
            self._update_flat_weights()

    def _weights(self) -> list[Any]:
        if checks.traced():
            return [getattr(self, name) for name in self._flat_weights_names]
        return self._flat_weights

    def _config(
        self, cell_states: bool = False, make: Callable[..., StackConfig] = StackConfig
    ) -> StackConfig:
        return make(
            self._cell(),
            self.num_layers,
            2 if self.bidirectional else 1,
            self.bias,
            self.proj_size > 0,
            self.batch_first,
            cell_states,
        )

    def _forward_padded(
        self, input: Tensor, hx: State, lengths: Tensor, reset: Any, cell_states: bool
    ) -> Any:
        """A padded batch with lengths; packed where only torch's own layers take it."""
        if reset is not None:
            reset = sequences.reset_rows(input, reset, self.batch_first)
        self._refresh()
        if not input.is_cuda and self._covers(input, hx):
            outputs = self._run(
                input, hx, fused=True, lengths=lengths, reset=reset, cell_states=cell_states
            )
            if outputs is not None:
                return outputs
        if checks.transformed() and self._fitting(input, hx) is not None:
            return self._run(
                input, hx, fused=False, lengths=lengths, reset=reset, cell_states=cell_states
            )

        def run(packed: PackedSequence, hx: Any, reset: PackedSequence | None) -> Any:
            if reset is not None or cell_states:
                return self._forward_further(packed, hx, reset, cell_states)
            return self._forward_as_torch(packed, hx)

        return sequences.by_packing(run, input, hx, lengths, reset, self.batch_first)

    def _fitting(self, input: Any, hx: Any) -> Fitting | None:
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
            states = hx if self._has_c else (hx,)
            if not isinstance(states, tuple | list) or len(states) != (2 if self._has_c else 1):
                return None
            layers = self.num_layers * (2 if self.bidirectional else 1)
            widths = (self.proj_size or self.hidden_size, self.hidden_size)
            for state, width in zip(states, widths, strict=False):
                shape = (layers, batch, width) if batched else (layers, width)
                if not isinstance(state, Tensor) or state.shape != shape:
                    return None
        return Fitting(data, (*states,), batch_sizes)

    def _precision(self, data: Tensor, states: Any, batch_sizes: Tensor | None) -> Precision | None:
        # What torch computes from products alone, and what it runs through oneDNN, autocast lowers.
        one_dnn = self.proj_size == 0 and data.dtype != torch.float16
        # Where that decides nothing, no graph need ask for the sizes.
        if precision.autocasts() and self._is_lowered(True) != self._is_lowered(False):
            one_dnn = one_dnn and (batch_sizes is None or not _is_uneven(batch_sizes))
        return precision.choose(data, states, self._weights(), self._is_lowered(one_dnn), one_dnn)

    def _run(
        self,
        input: Any,
        hx: State,
        *,
        fused: bool,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        cell_states: bool = False,
    ) -> Any:
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
        in_precision = self._precision(data, (h0, c0), batch_sizes)
        if not batched:
            h0, c0 = (s if s is None else s.unsqueeze(1) for s in (h0, c0))
        if order is not None:
            h0, c0 = (s if s is None else s.index_select(1, order) for s in (h0, c0))
        batch: Any = None
        if batch_sizes is not None and checks.traced():
            batch = sequences.known_batch(input, hx)
            batch = batch_sizes[0].item() if batch is None else batch
        sizes = batch_sizes if lengths is None else lengths
        inputs = Inputs(data, h0, c0, self._weights(), sizes, reset)
        outputs = recurrent_in(
            in_precision,
            self._config(cell_states),
            inputs.with_tensors(map(ops.rows, inputs.tensors)),
            dropout=self.dropout if self.training else 0.0,
            batch=batch,
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
            if cell_states:
                every_c = PackedSequence(every_c, batch_sizes, order, back)
        elif not batched:
            y = y.squeeze(0 if self.batch_first else 1)
            every_c = every_c.squeeze(0 if self.batch_first else 1) if cell_states else None
            h_n, c_n = (s if s is None else s.squeeze(1) for s in (h_n, c_n))
        return returned(y, h_n, c_n, every_c)


class RNN(Recurrent, torch.nn.RNN):
    """:class:`torch.nn.RNN` on fused kernels; the same constructor, state and behaviour."""

    def _is_lowered(self, one_dnn: bool) -> bool:
        return True


class LSTM(CoupledGates, Recurrent, torch.nn.LSTM):
    """:class:`torch.nn.LSTM` on fused kernels; the same constructor, state and behaviour.

    One more keyword, ``coupled_gates``. False, the default, is torch's LSTM. True couples the input
    gate to the forget gate, ``i = 1 - f`` (Greff et al. 2017, arXiv 1503.04069, "CIFG"). Weights and
    biases then have ``3 * H`` rows, for the gates f, g and o.
    """

    def _run_torch(self, input: Any, hx: Any) -> Any:
        if not self.coupled_gates:
            return super()._run_torch(input, hx)
        sizes = (self.input_size, self.hidden_size, self.num_layers, self.bias, self.batch_first)
        of_weights = {"device": self.weight_hh_l0.device, "dtype": self.weight_hh_l0.dtype}
        return torch.nn.LSTM(*sizes, 0.0, self.bidirectional, self.proj_size, **of_weights)(input, hx)

    def _is_lowered(self, one_dnn: bool) -> bool:
        return one_dnn or self.proj_size > 0


class GRU(ResetAfter, Recurrent, torch.nn.GRU):
    """:class:`torch.nn.GRU` on fused kernels; the same constructor, state and behaviour.

    One more keyword, ``reset_after`` (Keras's name). True, the default, is torch's and cuDNN's GRU:
    ``n = tanh(W_in x + b_in + r * (W_hn h + b_hn))``. False is the original one (Cho et al. 2014,
    arXiv 1406.1078, eq. 8): ``n = tanh(W_in x + b_in + W_hn (r * h) + b_hn)``. Both have the same
    parameters.
    """
