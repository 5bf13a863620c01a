"""The kernels on NumPy arrays, without torch.

Arrays may have any strides, alignment and byte order. The kernels read an array without a copy if its
last dimension is contiguous, its elements are aligned to their size, and its byte order is the
machine's. Other arrays are copied first. Results are new arrays, aligned, contiguous and in the
machine's byte order.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ._native import _C
from .stack import cell_table

__all__ = ["CELLS", "Forward", "Gradients", "Weights", "forward"]

Array = npt.NDArray[np.floating]

_MOST_THREADS = 2**31 - 1

_DTYPES = (np.dtype(np.float32), np.dtype(np.float64))

CELLS: tuple[str, ...] = tuple(cell_table.CELLS)
"""The names of the cells that ``forward`` takes."""


class Weights(NamedTuple):
    """The weights of one direction of one layer, in torch's layout.

    The shapes are ``w_ih [G * H, I]``, ``w_hh [G * H, H]``, and ``[G * H]`` for a bias. The ``G``
    blocks of ``H`` rows are the gates in torch's order (LSTM: i, f, g, o; GRU: r, z, n; LSTM with
    coupled gates: f, g, o; RNN: one block). A bias that is None means zeros.

    An LSTM's h may be projected to a width R, ``h = w_hr (o * tanh(c))`` (Sak et al. 2014, arXiv
    1402.1128). Then ``w_hr`` is ``[R, H]``, ``w_hh`` is ``[G * H, R]``, and the last dimension of y, h0
    and h_n is R. If ``w_hr`` is None, h is not projected.
    """

    w_ih: Array
    w_hh: Array
    b_ih: Array | None = None
    b_hh: Array | None = None
    w_hr: Array | None = None


class Gradients(NamedTuple):
    """The gradient of each argument of ``forward``, with the shape of the argument.

    ``b_ih``, ``b_hh`` and ``w_hr`` are None if forward ran without them. ``h0`` and ``c0`` are arrays
    even if forward ran without them; but ``c0`` is None for cells without a cell state.
    """

    x: Array
    h0: Array
    c0: Array | None
    w_ih: Array
    w_hh: Array
    b_ih: Array | None
    b_hh: Array | None
    w_hr: Array | None


class _Call(NamedTuple):
    stack: _C.Stack
    threads: int
    inputs: tuple[Any, ...]  # in the order of Inputs in _C.pyi
    saved: Array


@dataclass(frozen=True)
class Forward:
    """The outputs of one direction of one layer: ``y [T, B, H]``, ``h_n [B, H]``, ``c_n [B, H]``.

    ``h_n`` and ``c_n`` are the states after the last step. ``c_n`` is None for cells without a cell
    state. With a projection the last dimension of ``y`` and ``h_n`` is R.
    """

    y: Array
    h_n: Array
    c_n: Array | None
    _call: _Call | None = field(default=None, repr=False)

    def backward(
        self, dy: Array | None = None, dh_n: Array | None = None, dc_n: Array | None = None
    ) -> Gradients:
        """The gradients of forward's arguments.

        Neither the arguments of forward nor ``y`` may have changed since forward ran.

        Args:
            dy: the gradient of ``y``, with its shape; None means zeros.
            dh_n: the gradient of ``h_n``, with its shape; None means zeros.
            dc_n: the gradient of ``c_n``, with its shape; None means zeros.

        Raises:
            RuntimeError: forward ran without ``save=True``.
            ValueError: a shape does not match.
            TypeError: a dtype does not match.
        """
        if self._call is None:
            raise RuntimeError("backward needs forward(..., save=True)")
        stack, threads, inputs, saved = self._call
        x, _, _, weights, *_ = inputs
        dx, dh_0 = np.empty_like(x, order="C"), np.empty_like(self.h_n)
        dc_0 = None if self.c_n is None else np.empty_like(self.c_n)
        dweights = [None if w is None else np.empty_like(w, order="C") for w in weights]
        read = partial(_readable, dtype=self.y.dtype)
        grad_outputs = (read("dy", dy), read("dh_n", dh_n), read("dc_n", dc_n), None)
        grad_inputs = (dx, dh_0, dc_0, dweights, None, None)
        stack.backward(threads, inputs, self.y, saved, grad_outputs, grad_inputs)
        w_ih, w_hh, b_ih, b_hh, w_hr = dweights if len(dweights) == 5 else (*dweights, None)
        return Gradients(dx, dh_0, dc_0, w_ih, w_hh, b_ih, b_hh, w_hr)  # type: ignore[arg-type]


def _native(dtype: np.dtype[Any]) -> np.dtype[Any] | None:
    """The dtype in the machine's byte order; None if the kernels do not support the dtype."""
    return next((d for d in _DTYPES if dtype in (d, d.newbyteorder())), None)


def _readable(name: str, array: Array | None, dtype: np.dtype[Any]) -> Array | None:
    """The array, or a copy if the kernels cannot read the array. Raises TypeError for another dtype."""
    if array is None:
        return None
    a = np.asarray(array)
    if _native(a.dtype) != dtype:
        raise TypeError(f"{name} has dtype {a.dtype}; x has {dtype}")
    has_whole_strides = all(stride % a.itemsize == 0 for stride in a.strides)
    has_whole_rows = a.ndim == 0 or a.shape[-1] <= 1 or a.strides[-1] == a.itemsize
    is_aligned = a.size > 0 and a.flags.aligned  # NumPy says that every empty array is aligned
    if a.dtype.isnative and is_aligned and has_whole_strides and has_whole_rows:
        return a
    return np.array(a, dtype, order="C")


def _integer(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}; expected an integer") from None


def forward(
    cell: str,
    x: Array,
    weights: Weights | Sequence[Array | None],
    hx: Array | tuple[Array | None, Array | None] | None = None,
    *,
    reset: Array | None = None,
    reverse: bool = False,
    save: bool = False,
    threads: int | None = None,
) -> Forward:
    """Run one direction of one layer.

    Args:
        cell: one of ``CELLS``: "rnn_tanh", "rnn_relu", "lstm", "gru" (as torch and cuDNN
            compute it), "gru_original" (Cho et al. 2014, arXiv 1406.1078, eq. 8: the reset gate
            applies to h before the recurrent product) or "lstm_coupled" (Greff et al. 2017, arXiv
            1503.04069: ``i = 1 - f``).
        x: the input, ``[T, B, I]``, float32 or float64, with T at least 1. Every other array has the
            same dtype, in either byte order.
        weights: ``Weights``, or a sequence of its fields in their order.
        hx: the states before the first step, as torch takes them: h0 ``[B, H]``, or for an LSTM the
            tuple (h0, c0) of two such arrays. None instead of hx, h0 or c0 means zeros.
        reset: bools, ``[T, B]``; None means all False. Where ``reset[t, b]`` is True, the states of row
            b are zero before the computation of step t, and no gradient passes.
        reverse: run from the last step to the first; ``y[t]`` still belongs to ``x[t]``.
        save: save the values that ``Forward.backward`` needs.
        threads: the maximal number of threads; None means OpenMP's setting.

    Raises:
        ValueError: the cell is unknown, a shape does not match, or ``threads`` is less than 1
            or above 2**31 - 1.
        TypeError: ``x`` is not float32 or float64, the dtype of another array differs from that of
            ``x``, ``reset`` is not bool, a required array is None, ``weights`` has a wrong number of
            items, ``hx`` is not a tuple for an LSTM, or ``threads`` is not an integer.

    """
    if cell not in CELLS:
        raise ValueError(f"cell is {cell!r}; expected one of {', '.join(CELLS)}")
    threads = _C.max_threads() if threads is None else _integer("threads", threads)
    kind = cell_table.CELLS[cell]
    if not 2 <= len(weights) <= len(Weights._fields):
        raise TypeError(f"weights has {len(weights)} items; expected {', '.join(Weights._fields)}")
    w_ih, w_hh, b_ih, b_hh, w_hr = Weights(*weights)  # type: ignore[arg-type]
    if kind.has_c and hx is not None and not (isinstance(hx, tuple) and len(hx) == 2):
        raise TypeError(f"hx must be a tuple (h0, c0) for {cell}, or None; got {type(hx).__name__}")
    h0, c0 = hx if isinstance(hx, tuple) and len(hx) == 2 else (hx, None)
    if threads < 1:
        raise ValueError(f"threads is {threads}; expected at least 1")
    if threads > _MOST_THREADS:
        raise ValueError(f"threads is {threads}; expected at most {_MOST_THREADS}")
    for name, required in (("x", x), ("w_ih", w_ih), ("w_hh", w_hh)):
        if required is None:
            raise TypeError(f"{name} must be an array, not None")
    x, w_hh = np.asarray(x), np.asarray(w_hh)
    dtype = _native(x.dtype)
    if dtype is None:
        raise TypeError(f"x has dtype {x.dtype}; expected float32 or float64")
    read = partial(_readable, dtype=dtype)
    x_and_states = (read("x", x), read("h0", h0), read("c0", c0))
    readable = [read("w_ih", w_ih), read("w_hh", w_hh), read("b_ih", b_ih), read("b_hh", b_hh)]
    if w_hr is not None:
        readable.append(read("w_hr", w_hr))
    if reset is not None:
        reset = np.asarray(reset)
        if reset.dtype != np.bool_:
            raise TypeError(f"reset has dtype {reset.dtype}; expected bool")
    if x.ndim != 3:
        raise ValueError(f"x has shape {x.shape}; expected (T, B, I)")
    if w_hh.ndim != 2:
        raise ValueError(
            f"w_hh has shape {w_hh.shape}; expected (G * H, {'H' if w_hr is None else 'R'})"
        )
    if w_hr is not None and np.ndim(w_hr) != 2:
        raise ValueError(f"w_hr has shape {np.shape(w_hr)}; expected (R, H)")
    (steps, batch, _), outputs = x.shape, w_hh.shape[1]
    hidden = outputs if w_hr is None else np.shape(w_hr)[1]
    stack = _C.Stack(cell=kind.number, single=True, reverse=bool(reverse), projected=w_hr is not None)
    y = np.empty((steps, batch, outputs), dtype)
    h_n = np.empty((batch, outputs), dtype)
    c_n = np.empty((batch, hidden), dtype) if kind.has_c else None
    saved: Array | None = None
    if save:
        memory = stack.new_saved(dtype.name, steps * batch, hidden, outputs)
        saved = np.frombuffer(memoryview(memory), np.uint8)
    inputs = (*x_and_states, readable, None, reset)
    stack.forward(threads, inputs, (y, h_n, c_n, None, saved))
    call = None if saved is None else _Call(stack, threads, inputs, saved)
    return Forward(y, h_n, c_n, call)
