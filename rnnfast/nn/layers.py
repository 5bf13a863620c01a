"""LSTM, GRU and RNN, as subclasses of torch.nn's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..stack import checks, ops, packed_weights, precision, sequences
from ..stack.config import Inputs, StackConfig
from ..stack.precision import Precision
from .call import Fitting, Fused, State, forward_result
from .keywords import CoupledGates, ResetAfter
from .route import recurrent_in

__all__ = ["GRU", "LSTM", "RNN", "Recurrent"]


def _is_uneven(batch_sizes: Tensor) -> bool:
    """Whether the rows of a packed sequence differ in length."""
    return len(batch_sizes) > 0 and bool(batch_sizes[0] != batch_sizes[-1])


class Recurrent(Fused, torch.nn.RNNBase):
    """The base of RNN, LSTM and GRU. It adds no state, so ``accelerate`` only changes the class."""

    _dims = 3

    def __init__(self, *args: Any, device: Any = None, **kwargs: Any) -> None:
        if device is not None:  # torch.nn.utils.skip_init requires a parameter named device
            kwargs["device"] = device
        super().__init__(*args, **kwargs)

    def _cell(self) -> str:
        return self.mode.lower()  # torch's "LSTM", "GRU", "RNN_TANH" or "RNN_RELU"

    def _is_lowered(self, one_dnn: bool) -> bool:
        """Whether autocast casts torch's layer to its lower-precision dtype.

        ``one_dnn`` says whether oneDNN could compute the layer.
        """
        return False

    # Not keyword-only: torch.onnx's older exporter passes all arguments by position.
    def forward(
        self,
        input: Any,
        hx: Any = None,
        lengths: Any = None,
        reset: Any = None,
        return_cell_states: bool = False,
    ) -> Any:
        """As torch's ``forward``, with three more arguments, which callers should pass by name.

        D is the number of directions and L the number of layers. Where an LSTM has a projection, the
        last dimension of output, h_0 and h_n is R in the place of H.

        Args:
            input (Tensor | PackedSequence): ``[T, B, I]`` (``[B, T, I]`` with ``batch_first``),
                ``[T, I]``, or a PackedSequence.
            hx (Tensor | tuple[Tensor, Tensor] | None): the initial states: h_0 ``[D * L, B, H]``, for
                an LSTM the tuple (h_0, c_0) of two such tensors. Without a batch ``[D * L, H]``. None
                means zeros.
            lengths (Tensor | list[int] | None): ``[B]`` integers on the CPU, from 0 to T, in any order:
                the number of real steps of each row of a padded batch. Only the real steps are
                computed. Past a row's end the output and the gradient of the input are zero. The final
                states of a row are those after its last real step (in the reverse direction after step
                0); a row of length 0 returns its initial states. Under autocast the results have the
                dtypes of a padded batch without lengths. In torch.compile pass a tensor: one graph
                serves all tensors, but each new list is compiled again.
            reset (Tensor | PackedSequence | None): bools, ``[T, B]`` (``[B, T]`` with ``batch_first``,
                ``[T]`` without a batch), such as the ``done`` flags of reinforcement learning. Where
                True at step t, the row's states are zero before the computation of step t, in every
                layer, and no gradient passes. The reverse direction computes its steps from the last to
                the first. For a PackedSequence: a PackedSequence of bools with the same lengths and
                order, or the padded shape.
            return_cell_states (bool): LSTM only: return ``(output, (h_n, c_n), cell_states)``. The
                ``cell_states`` are those of the last layer at every step, ``[T, B, D * H]``, with the
                layout of ``output``.

        Returns:
            tuple: ``(output, h_n)``, for an LSTM ``(output, (h_n, c_n))``. ``output`` has h of the last
                layer at every step, ``[T, B, D * H]`` (``[B, T, D * H]`` with ``batch_first``,
                ``[T, D * H]`` without a batch, a PackedSequence for a PackedSequence). ``h_n`` and
                ``c_n`` are the states after the last step, with the shapes of h_0 and c_0.

        Raises:
            TypeError: ``lengths`` are not integers, ``reset`` is not bool, or ``lengths`` come with a
                PackedSequence.
            ValueError: ``lengths`` or ``reset`` has a wrong shape; ``reset`` is on another device than
                ``input``; ``return_cell_states`` without a cell state.
            RuntimeError: a length is out of range; ``lengths`` are not on the CPU; torch's own errors.
        """
        if lengths is not None:
            lengths = sequences.lengths_of(input, lengths, self.batch_first)
        is_plain = type(input) is Tensor and checks.plain_call() and not precision.may_autocast()
        if is_plain and not (self.training and self.num_layers > 1 and self.dropout > 0):
            names = self._flat_weights_names
            outputs = self._forward_directly(input, hx, names, lengths, reset, return_cell_states)
            if outputs is None and lengths is None and reset is None:
                outputs = self._forward_unbatched(input, hx, names, return_cell_states)
            if outputs is not None:
                return outputs
        is_own = lengths is not None or reset is not None or return_cell_states
        if not is_own and self._is_torchs(input):
            return super().forward(input, hx)
        if return_cell_states and not self._has_c:
            raise ValueError(
                f"return_cell_states needs an LSTM; {type(self).__name__} has no cell state"
            )
        if lengths is not None:
            return self._forward_padded(input, hx, lengths, reset, return_cell_states)
        if reset is not None or return_cell_states:
            return self._forward_further(input, hx, reset, return_cell_states)
        return self._forward_as_torch(input, hx)

    def _weights(self) -> list[Any]:
        flat: list[Any] = self._flat_weights
        if checks.traced():
            weights = [getattr(self, name) for name in self._flat_weights_names]
            is_written = False
            for weight, written in zip(weights, flat, strict=False):  # see precision.choose
                is_written = is_written or weight is not written
            if is_written and not self._weights_have_changed():  # type: ignore[no-untyped-call]
                return [*flat]
            return weights
        # The accesses of torch's _update_flat_weights: a random parametrization draws torch's numbers.
        # The list is not kept: it may have the graph of a functional_call.
        if not self._weights_have_changed():  # type: ignore[no-untyped-call]
            return flat
        return [
            getattr(self, name) if hasattr(self, name) else None for name in self._flat_weights_names
        ]

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
            precision.of_float32(may_trace=make is StackConfig),
        )

    def _forward_padded(
        self, input: Tensor, hx: State, lengths: Tensor, reset: Any, cell_states: bool
    ) -> Any:
        """A padded batch with lengths; packed if torch's own layers have to compute it."""
        if reset is not None:
            reset = sequences.reset_rows(input, reset, self.batch_first)
        weights, options = self._weights(), {"reset": reset, "cell_states": cell_states}
        covered = None if input.is_cuda else self._covers(input, hx, weights)
        if covered is not None:
            outputs = self._run(input, hx, weights, covered=covered, lengths=lengths, **options)
            if outputs is not None:
                return outputs
        if checks.transformed() and self._fitting(input, hx) is not None:
            return self._run(input, hx, weights, covered=None, lengths=lengths, **options)

        def run(packed: PackedSequence, hx: Any, reset: PackedSequence | None) -> Any:
            if reset is not None or cell_states:
                return self._forward_further(packed, hx, reset, cell_states)
            return self._forward_as_torch(packed, hx)

        return sequences.by_packing(run, input, hx, lengths, reset, self.batch_first)

    def _fitting(self, input: Any, hx: Any) -> Fitting | None:
        batch: int | None
        batch_sizes = None
        if isinstance(input, PackedSequence):
            data, is_batched, batch_sizes = input.data, True, input.batch_sizes
            if not isinstance(data, Tensor):
                return None
            batch = sequences.known_batch(input, hx)
            has_valid_shape = data.dim() == 2 and checks.packs(input.batch_sizes, data.size(0))
        elif isinstance(input, Tensor):
            data, is_batched = input, input.dim() == 3
            batch = input.size(0 if self.batch_first else 1) if is_batched else 0
            time = 1 if is_batched and self.batch_first else 0
            has_valid_shape = input.dim() in (2, 3)
            # torch refuses T = 0. In a graph T may be unknown: the operator refuses it when it runs.
            has_valid_shape = has_valid_shape and (checks.traced() or input.size(time) > 0)
        else:
            return None
        if not has_valid_shape or data.size(-1) != self.input_size:
            return None
        states: tuple[Any, ...] = ()
        if hx is not None:
            states = hx if self._has_c else (hx,)
            if not isinstance(states, tuple | list) or len(states) != (2 if self._has_c else 1):
                return None
            layers = self.num_layers * (2 if self.bidirectional else 1)
            widths = (self.proj_size or self.hidden_size, self.hidden_size)
            for state, width in zip(states, widths, strict=False):
                shape = (layers, batch, width) if is_batched else (layers, width)
                if not isinstance(state, Tensor) or state.shape != shape:
                    return None
        return Fitting(data, (*states,), batch_sizes)

    def _precision(
        self, data: Tensor, states: Any, batch_sizes: Tensor | None, weights: list[Any]
    ) -> Precision | None:
        # Autocast lowers a layer that torch computes with products alone or with oneDNN.
        one_dnn = self.proj_size == 0 and data.dtype != torch.float16
        # Batch sizes are read only if they decide: in a graph they are data-dependent.
        if precision.autocasts() and self._is_lowered(True) != self._is_lowered(False):
            one_dnn = one_dnn and (batch_sizes is None or not _is_uneven(batch_sizes))
        return precision.choose(data, states, weights, self._is_lowered(one_dnn), one_dnn)

    def _run(
        self,
        input: Any,
        hx: State,
        weights: list[Any],
        *,
        covered: Precision | None,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        cell_states: bool = False,
    ) -> Any:
        batch_sizes = sorted_indices = unsorted_indices = None
        if lengths is not None and covered is None:
            sequences.check_lengths(lengths, input.size(1 if self.batch_first else 0))
        data, is_batched = input, True
        if isinstance(input, PackedSequence):
            data, batch_sizes, sorted_indices, unsorted_indices = input
        elif input.dim() == 2:
            batch_dim, _ = self._batch_dims()
            data, is_batched = input.unsqueeze(batch_dim), False
            reset = reset if reset is None else reset.unsqueeze(batch_dim)
        h0, c0 = (None, None) if hx is None else hx if isinstance(hx, tuple | list) else (hx, None)
        chosen = covered or self._precision(data, (h0, c0), batch_sizes, weights)
        config = self._config(cell_states)
        weights, packed = packed_weights.converted(self, config, weights, covered)
        if not is_batched:
            h0, c0 = (s if s is None else s.unsqueeze(1) for s in (h0, c0))
        if sorted_indices is not None:
            h0, c0 = (s if s is None else s.index_select(1, sorted_indices) for s in (h0, c0))
        batch: Any = None
        if batch_sizes is not None and checks.traced():
            batch = sequences.known_batch(input, hx)
            batch = batch_sizes[0].item() if batch is None else batch
        sizes = batch_sizes if lengths is None else lengths
        inputs = Inputs(data, h0, c0, weights, sizes, reset)
        outputs = recurrent_in(
            chosen,
            config,
            ops.readable(inputs),
            dropout=self.dropout if self.training else 0.0,
            batch=batch,
            fused=covered is not None,
            packed=packed,
        )
        if outputs is None:
            return None
        y: Any
        every_c: Any
        y, h_n, c_n, every_c, _ = outputs
        if batch_sizes is not None:
            if unsorted_indices is not None:
                h_n, c_n = (s if s is None else s.index_select(1, unsorted_indices) for s in (h_n, c_n))
            y = PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices)
            if cell_states:
                every_c = PackedSequence(every_c, batch_sizes, sorted_indices, unsorted_indices)
        result = forward_result(y, h_n, c_n, every_c)
        return result if is_batched else self._without_batch(result)


class RNN(Recurrent, torch.nn.RNN):
    """The Elman network: ``torch.nn.RNN`` on fused kernels, with its constructor and parameters.

    Each layer computes for every step t:

    ```math
    h_t = f(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})
    ```

    f is tanh, or ReLU with ``nonlinearity="relu"``.

    Source: Elman 1990, "Finding Structure in Time".

    Args:
        input_size (int): I, the number of features of the input.
        hidden_size (int): H, the number of hidden units.
        num_layers (int): the number of layers, 1 by default. Every layer but the first reads the output
            of the layer below it.
        nonlinearity (str): "tanh", the default, or "relu".
        bias (bool): whether the layers have biases, True by default.
        batch_first (bool): whether the batch is the first dimension of input and output, ``[B, T, I]``
            instead of ``[T, B, I]``; False by default. It does not concern the states.
        dropout (float): the probability of dropout on the output of every layer but the last, in
            training; 0 by default. The masks are torch's for the same seed.
        bidirectional (bool): whether each layer also runs from the last step to the first, with weights
            of its own; False by default.
        device (torch.device): the device of the parameters.
        dtype (torch.dtype): the dtype of the parameters.

    Raises:
        ValueError: ``nonlinearity`` is unknown, a size is out of range, or ``proj_size`` is given.
        TypeError: an argument has a wrong type.
    """

    def _is_lowered(self, one_dnn: bool) -> bool:
        return True


class LSTM(CoupledGates, Recurrent, torch.nn.LSTM):
    """Long short-term memory: ``torch.nn.LSTM`` on fused kernels, and one more keyword.

    Each layer computes for every step t:

    ```math
    i_t = σ(W_{ii} x_t + b_{ii} + W_{hi} h_{t-1} + b_{hi})
    f_t = σ(W_{if} x_t + b_{if} + W_{hf} h_{t-1} + b_{hf})
    g_t = tanh(W_{ig} x_t + b_{ig} + W_{hg} h_{t-1} + b_{hg})
    o_t = σ(W_{io} x_t + b_{io} + W_{ho} h_{t-1} + b_{ho})
    c_t = f_t ⊙ c_{t-1} + i_t ⊙ g_t
    h_t = o_t ⊙ tanh(c_t)
    ```

    σ is the logistic function, and ⊙ multiplies element by element.

    With ``proj_size`` h is narrower than c:

    ```math
    h_t = W_{hr} (o_t ⊙ tanh(c_t))
    ```

    With ``coupled_gates=True`` the input gate is 1 - f. The cell has no gate i, and no weights for it:

    ```math
    c_t = f_t ⊙ c_{t-1} + (1 - f_t) ⊙ g_t
    ```

    Sources:

    - Gates i and o, cell state c: Hochreiter and Schmidhuber 1997, "Long Short-Term Memory".
    - Forget gate f: Gers, Schmidhuber and Cummins 2000, "Learning to Forget".
    - Coupled gates: Greff et al. 2017, arXiv 1503.04069, the variant "CIFG".
    - Projection: Sak, Senior and Beaufays 2014, arXiv 1402.1128.

    Args:
        input_size (int): I, the number of features of the input.
        hidden_size (int): H, the number of hidden units.
        num_layers (int): the number of layers, 1 by default. Every layer but the first reads the output
            of the layer below it.
        bias (bool): whether the layers have biases, True by default.
        batch_first (bool): whether the batch is the first dimension of input and output, ``[B, T, I]``
            instead of ``[T, B, I]``; False by default. It does not concern the states.
        dropout (float): the probability of dropout on the output of every layer but the last, in
            training; 0 by default. The masks are torch's for the same seed.
        bidirectional (bool): whether each layer also runs from the last step to the first, with weights
            of its own; False by default.
        proj_size (int): R, the width of h where h is projected; 0, the default, means no projection.
        coupled_gates (bool): whether the input gate is 1 - f; False, the default, is torch's LSTM. With
            True the weights and biases have ``3 * H`` rows, for the gates f, g and o.
        device (torch.device): the device of the parameters.
        dtype (torch.dtype): the dtype of the parameters.

    Raises:
        ValueError: a size is out of range, or ``proj_size`` is negative or not less than
            ``hidden_size``.
        TypeError: an argument has a wrong type.
    """

    def _run_torch(self, input: Any, hx: Any) -> Any:
        if not self.coupled_gates:
            return super()._run_torch(input, hx)
        sizes = (self.input_size, self.hidden_size, self.num_layers, self.bias, self.batch_first)
        factory_kwargs = {"device": self.weight_hh_l0.device, "dtype": self.weight_hh_l0.dtype}
        module = torch.nn.LSTM(*sizes, 0.0, self.bidirectional, self.proj_size, **factory_kwargs)
        return module(input, hx)

    def _is_lowered(self, one_dnn: bool) -> bool:
        return one_dnn or self.proj_size > 0


class GRU(ResetAfter, Recurrent, torch.nn.GRU):
    """The gated recurrent unit: ``torch.nn.GRU`` on fused kernels, and one more keyword.

    Each layer computes for every step t:

    ```math
    r_t = σ(W_{ir} x_t + b_{ir} + W_{hr} h_{t-1} + b_{hr})
    z_t = σ(W_{iz} x_t + b_{iz} + W_{hz} h_{t-1} + b_{hz})
    n_t = tanh(W_{in} x_t + b_{in} + r_t ⊙ (W_{hn} h_{t-1} + b_{hn}))
    h_t = (1 - z_t) ⊙ n_t + z_t ⊙ h_{t-1}
    ```

    σ is the logistic function, and ⊙ multiplies element by element. The reset gate r applies after the
    product with the recurrent weights. With ``reset_after=False`` it applies to h before the product:

    ```math
    n_t = tanh(W_{in} x_t + b_{in} + W_{hn} (r_t ⊙ h_{t-1}) + b_{hn})
    ```

    Both forms have the same parameters.

    Sources:

    - r, z, h, and n with ``reset_after=False``: Cho et al. 2014, arXiv 1406.1078, equations 5 to 8.
    - n with ``reset_after=True``: cuDNN's and torch's form. Keras named the option.

    Args:
        input_size (int): I, the number of features of the input.
        hidden_size (int): H, the number of hidden units.
        num_layers (int): the number of layers, 1 by default. Every layer but the first reads the output
            of the layer below it.
        bias (bool): whether the layers have biases, True by default.
        batch_first (bool): whether the batch is the first dimension of input and output, ``[B, T, I]``
            instead of ``[T, B, I]``; False by default. It does not concern the states.
        dropout (float): the probability of dropout on the output of every layer but the last, in
            training; 0 by default. The masks are torch's for the same seed.
        bidirectional (bool): whether each layer also runs from the last step to the first, with weights
            of its own; False by default.
        reset_after (bool): whether the reset gate applies after the recurrent product. True, the
            default, is torch's GRU. False is the original GRU.
        device (torch.device): the device of the parameters.
        dtype (torch.dtype): the dtype of the parameters.

    Raises:
        ValueError: a size is out of range, or ``proj_size`` is given.
        TypeError: an argument has a wrong type.
    """
