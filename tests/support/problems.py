"""Random problems, and every way of solving one: the truth, torch.nn, arrays, modules, cells.

A solution is a dict of NumPy arrays: y, h_n, c_n, and the gradients d_x, d_h0, d_c0, d_w_ih, ...
of the loss <dy, y> + <dh_n, h_n> + <dc_n, c_n>.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

import reference
import rnnfast
import tolerances
from rnnfast.arrays import Weights

Solution = dict[str, np.ndarray]

INPUTS = ("x", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh")
PARAMETERS = {
    "w_ih": "weight_ih",
    "w_hh": "weight_hh",
    "b_ih": "bias_ih",
    "b_hh": "bias_hh",
    "w_hr": "weight_hr",
}


@dataclass(frozen=True)
class Problem:
    cell: str
    T: int
    B: int
    I: int
    H: int
    dtype: str = "float32"
    bias: bool = True
    reverse: bool = False
    R: int = 0  # the width that h is projected to; 0: it is not
    seed: int = 0

    def inputs(self) -> dict[str, np.ndarray]:
        """Fresh arrays of the size, scale and layout that a module would have."""
        cell, rng = reference.CELLS[self.cell], np.random.default_rng(self.seed)
        rows, k = cell.gates * self.H, self.H**-0.5
        arrays = {
            "x": rng.standard_normal((self.T, self.B, self.I)),
            "h0": 0.5 * rng.standard_normal((self.B, self.R or self.H)),
            "c0": 0.5 * rng.standard_normal((self.B, self.H)),
            "w_ih": rng.uniform(-k, k, (rows, self.I)),
            "w_hh": rng.uniform(-k, k, (rows, self.R or self.H)),
            "b_ih": rng.uniform(-k, k, rows),
            "b_hh": rng.uniform(-k, k, rows),
            "w_hr": rng.uniform(-k, k, (self.R, self.H)),
        }
        if not self.R:
            del arrays["w_hr"]
        if not cell.has_c:
            del arrays["c0"]
        if not self.bias:
            del arrays["b_ih"], arrays["b_hh"]
        return {name: value.astype(self.dtype) for name, value in arrays.items()}

    def cotangents(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(self.seed + 1000)
        arrays = {
            "dy": rng.standard_normal((self.T, self.B, self.R or self.H)),
            "dh_n": rng.standard_normal((self.B, self.R or self.H)),
            "dc_n": rng.standard_normal((self.B, self.H)),
        }
        if not reference.CELLS[self.cell].has_c:
            del arrays["dc_n"]
        return {name: value.astype(self.dtype) for name, value in arrays.items()}

    def chain(self, name: str) -> int:
        """How many terms the sums behind a result have."""
        if name.startswith(("d_w", "d_b")):
            return self.T * self.B
        if name.startswith("d_"):
            return reference.CELLS[self.cell].gates * self.H
        return self.I + self.H

    def __str__(self) -> str:
        flags = "" if self.bias else "-nobias"
        flags += "-reverse" if self.reverse else ""
        flags += f"-R{self.R}" if self.R else ""
        return f"{self.cell}-{self.dtype}-T{self.T}B{self.B}I{self.I}H{self.H}{flags}"


def solve(problem: Problem, forward, dtype: str) -> Solution:
    """Run `forward(leaves) -> (y, h_n, c_n or None)` on torch tensors, and its backward."""
    leaves = {
        name: torch.nn.Parameter(torch.from_numpy(value.astype(dtype)))
        for name, value in problem.inputs().items()
    }
    y, h_n, c_n = forward(leaves)
    outputs = {"y": y, "h_n": h_n} | ({"c_n": c_n} if "c0" in leaves else {})
    cotangents = [torch.from_numpy(d.astype(dtype)) for d in problem.cotangents().values()]
    torch.autograd.backward(list(outputs.values()), cotangents)
    solution = {name: value.detach().numpy() for name, value in outputs.items()}
    return solution | {f"d_{name}": leaf.grad.numpy() for name, leaf in leaves.items()}


def by_formula(problem: Problem, dtype: str = "float64") -> Solution:
    def forward(leaves):
        zero = torch.zeros(len(leaves["w_ih"]), dtype=leaves["w_ih"].dtype)
        full = {"c0": None, "b_ih": zero, "b_hh": zero} | leaves
        x, h0, c0, *weights = (full[name] for name in INPUTS)
        w_hr = leaves.get("w_hr")
        return reference.layer(problem.cell, x, h0, c0, weights, w_hr=w_hr, reverse=problem.reverse)

    return solve(problem, forward, dtype)


def by_module(problem: Problem, package=rnnfast, layout=lambda x: x) -> Solution:
    """A one-layer module of `package`; `layout` rearranges x, as a user's view would."""
    cell = reference.CELLS[problem.cell]
    kind = getattr(package, cell.layer)
    options = dict(cell.options) | ({"proj_size": problem.R} if problem.R else {})
    module = kind(problem.I, problem.H, bias=problem.bias, **options)

    def forward(leaves):
        for name in PARAMETERS.keys() & leaves.keys():
            setattr(module, PARAMETERS[name] + "_l0", leaves[name])
        x, hx = layout(leaves["x"]), leaves["h0"][None]
        x = x.flip(0) if problem.reverse else x
        y, state = module(x, (hx, leaves["c0"][None]) if cell.has_c else hx)
        y = y.flip(0) if problem.reverse else y
        h_n, c_n = (state[0][0], state[1][0]) if cell.has_c else (state[0], None)
        return y, h_n, c_n

    return solve(problem, forward, problem.dtype)


def by_cell_module(problem: Problem, package=rnnfast) -> Solution:
    """A cell module, called once for each step."""
    cell = reference.CELLS[problem.cell]
    kind = getattr(package, cell.layer + "Cell")
    module = kind(problem.I, problem.H, bias=problem.bias, **dict(cell.options))

    def forward(leaves):
        for name in PARAMETERS.keys() & leaves.keys():
            setattr(module, PARAMETERS[name], leaves[name])
        state, y = (leaves["h0"], leaves["c0"]) if cell.has_c else leaves["h0"], []
        for x in leaves["x"]:
            state = module(x, state)
            y.append(state[0] if cell.has_c else state)
        return torch.stack(y), *(state if cell.has_c else (state, None))

    return solve(problem, forward, problem.dtype)


def forward_arrays(cell, x, h0=None, c0=None, **arrays):
    """rnnfast.arrays.forward of weights by their names, beside its own options."""
    names = [name for name in Weights._fields if name in arrays]
    weights = Weights(**{name: arrays.pop(name) for name in names})
    return rnnfast.arrays.forward(cell, x, weights, (h0, c0), **arrays)


def by_arrays(problem: Problem, threads: int = 1, layout=lambda a: a) -> Solution:
    """rnnfast.arrays; `layout` rearranges every array without changing its values."""
    arrays = {name: layout(value) for name, value in problem.inputs().items()}
    cotangents = {name: layout(value) for name, value in problem.cotangents().items()}
    result = forward_arrays(problem.cell, **arrays, reverse=problem.reverse, save=True, threads=threads)
    grads = result.backward(**cotangents)
    names = ["y", "h_n"] + ["c_n"] * ("c0" in arrays)
    solution = {name: getattr(result, name) for name in names}
    return solution | {f"d_{name}": getattr(grads, name) for name in arrays}


@cache
def truth(problem: Problem) -> Solution:
    return by_formula(problem)


@cache
def peer(problem: Problem) -> Solution:
    """What PyTorch makes of it in the problem's own dtype."""
    if reference.CELLS[problem.cell].in_torch:
        return by_module(problem, torch.nn)
    return by_formula(problem, problem.dtype)


def check(solution: Solution, problem: Problem) -> None:
    """Every array of the solution has the shape, the dtype and the values that it must have."""
    assert solution.keys() == truth(problem).keys()
    wrong = []
    for name, true in truth(problem).items():
        got = solution[name]
        assert got.shape == true.shape, name
        assert got.dtype == problem.dtype, name
        error = tolerances.units(got, true)
        torchs = tolerances.units(peer(problem)[name], true)
        most = tolerances.bound(name, problem.dtype, problem.chain(name), torchs)
        if not error <= most:  # a NaN is wrong too
            wrong.append(f"{name}: off by {error:.3g} units, {most:.3g} allowed")
    assert not wrong, f"{problem}: " + "; ".join(wrong)


def same_bits(a: Solution, b: Solution) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if a[name].tobytes() != b[name].tobytes()]
    assert not different, f"not the same bits: {different}"
