"""How far a result may be from the float64 truth: the only tolerances of the kernels' tests.

An error is the largest absolute difference over a tensor, in units of the dtype's epsilon times
max(1, largest true value). In float64 it may be 1e-12. In float32 it may be twice the error that
torch.nn makes on the same problem (the eager formula, where torch.nn has no such cell), or a
floor of a few units: the kernels sum in slices of SLICE, and a chain of K roundings is a random walk
whose worst element, of thousands, is near sqrt(K) / 4 units off.

The root mean square has no such outliers, and no floor: twice torch's.
"""

from __future__ import annotations

import numpy as np

FLOAT64 = 1e-12
FLOOR_OUTPUT, FLOOR_GRADIENT = 5.0, 8.0  # units, for the activations and for the steps in between
PEER_FACTOR = 2.0
SLICE = 64

# The activations alone, relative to the value: one function, or a product of three.
ACTIVATION = {"rnn_tanh": 0.75, "rnn_relu": 0.0, "lstm": 3.5, "gru": 4.0, "gru_original": 4.0}
ACTIVATION["lstm_coupled"] = 4.0

# tanh alone, in units in the last place of the true value; and the relative error of a gradient through
# it where it nearly saturates, as a multiple of torch.nn's.
TANH = 1.0
SATURATED = 1.25

# The rms error of sums of 64 to 1024 products of normally distributed numbers, with variance 1, whose
# numbers are split into so many bfloat16 parts. Three parts leave little but one rounding of the sum:
# float32 multiply-adds are 1.5e-7 off.
IN_PARTS = {1: 2.6e-3, 2: 5e-6, 3: 9e-8}

# Central differences with a step of EPS^(1/3): truncation and rounding are both near EPS^(2/3),
# 4e-11, times a third derivative through some steps of tanh and sigmoid.
CENTRAL_STEP = 2.0**-17
CENTRAL_RTOL = 1e-8


def units(got, want) -> float:
    """The error of `got` in units; NaN where only one of the two is NaN."""
    want = np.asarray(want, np.float64)
    if want.size == 0:
        return 0.0
    scale = max(1.0, float(np.abs(want).max()))
    error = np.abs(np.asarray(got, np.float64) - want).max()
    return float(error / (np.finfo(got.dtype).eps * scale))


def last_places(got, want) -> float:
    """The largest error of `got` in units in the last place of `want`, the truth in a wider dtype."""
    _, exponent = np.frexp(want)
    unit = np.ldexp(np.ones_like(want), exponent - np.finfo(got.dtype).nmant - 1)
    return float((np.abs(got - want) / unit).max())


def rms(got, want) -> float:
    return float(np.sqrt(np.mean((np.asarray(got, np.float64) - want) ** 2)))


def bound(name: str, dtype: str, chain: int, peer: float) -> float:
    """Units that the result `name` may be off, from its longest sum and its peer's error."""
    if dtype == "float64":
        return FLOAT64 / np.finfo(dtype).eps
    floor = FLOOR_GRADIENT if name.startswith("d_") else FLOOR_OUTPUT
    return max(PEER_FACTOR * peer, floor + min(chain, SLICE) ** 0.5 / 4)
