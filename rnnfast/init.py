"""Common initialisations of recurrent weights.

Each function changes the weights of a module in place and returns the module. The module is an RNN,
LSTM or GRU, or one of their cells, of rnnfast or of torch.nn. Every layer and direction is treated
alike. A function raises ValueError for a cell for which it is not meant, and for a weight that is
parametrized or pruned; nothing has changed then.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from .nn.call import Fused
from .stack.cell_table import CELLS, Cell

__all__ = ["chrono_", "forget_bias_", "identity_", "orthogonal_"]

Module = TypeVar("Module", bound=nn.Module)


def identity_(module: Module, scale: float = 1.0) -> Module:
    """Set W_hh to ``scale`` times the identity, and the biases to zero.

    Source: Le, Jaitly and Hinton 2015, arXiv 1504.00941. Meant for RNN and RNNCell with
    ``nonlinearity="relu"``. Without inputs such a network keeps its state, and its gradients neither
    vanish nor explode. W_ih stays as it is.

    Raises:
        ValueError: the cell is another one.

    """
    cell = _cell_of(module)
    if cell.onnx.activation != "Relu":
        raise ValueError(
            f"identity_ is meant for an RNN with nonlinearity='relu'; {_name(module)} is a {cell.name}"
        )
    with torch.no_grad():
        for w_hh, biases in _recurrent_weights(module):
            w_hh.zero_().fill_diagonal_(scale)
            for bias in biases:
                bias.zero_()
    return module


def orthogonal_(module: Module, gain: float = 1.0, generator: torch.Generator | None = None) -> Module:
    """Set each gate's block of W_hh to a random orthogonal matrix.

    Source: Saxe, McClelland and Ganguli 2014, arXiv 1312.6120. Meant for every cell. With a projection
    a block is ``[H, R]``, and its columns are orthonormal.

    Args:
        module: a recurrent module.
        gain: the factor of the matrix.
        generator: of the random numbers; None means torch's default generator.

    Raises:
        ValueError: ``module`` is not recurrent.

    """
    cell = _cell_of(module)
    with torch.no_grad():
        for w_hh, _ in _recurrent_weights(module):
            for block in w_hh.chunk(cell.weight_blocks):
                # torch has no QR decomposition in half precision.
                matrix = block.float() if block.dtype.itemsize < 4 else block
                block.copy_(nn.init.orthogonal_(matrix, gain, generator))
    return module


def forget_bias_(module: Module, value: float = 1.0) -> Module:
    """Set the sum of the forget gate's two biases to ``value``.

    Source: Jozefowicz, Zaremba and Sutskever 2015, section 2.2. A large forget bias lets an LSTM
    remember from the start. Meant for LSTM and LSTMCell, with or without coupled gates.

    Raises:
        ValueError: the cell has no forget gate, or the module has no biases.

    """
    cell = _cell_of(module)
    if "f" not in cell.block_names:
        raise ValueError(
            f"forget_bias_ is meant for an LSTM; {_name(module)} is a {cell.name}, whose gates are "
            f"{', '.join(cell.block_names)}"
        )
    with torch.no_grad():
        for b_ih, b_hh in _biases(module, "forget_bias_"):
            _block(b_ih, cell, "f").fill_(value)
            _block(b_hh, cell, "f").zero_()
    return module


def chrono_(module: Module, longest: float, generator: torch.Generator | None = None) -> Module:
    """Spread the memories of the units over 1 to ``longest`` steps.

    Source: Tallec and Ollivier 2018, arXiv 1804.11188, section 3. The gate that keeps the state gets
    the bias log(u), with u uniform in [1, longest - 1]. A unit then keeps its state for about u steps.
    Meant for LSTM and GRU, and for their cells. An LSTM keeps its state by the forget gate; its input
    gate, where there is one, gets the negative bias. A GRU keeps its state by the gate z of torch's
    formula. All other biases become zero.

    Args:
        module: a recurrent module with biases.
        longest: the longest dependency in steps, at least 2.
        generator: of the random numbers; None means torch's default generator.

    Raises:
        ValueError: the cell has no gate that keeps its state, the module has no biases, or ``longest``
            is below 2, infinite or too large for the biases' dtype.

    """
    cell = _cell_of(module)
    keep = next((name for name in ("f", "z") if name in cell.block_names), None)
    if keep is None:
        raise ValueError(
            f"chrono_ is meant for an LSTM or GRU; {_name(module)} is a {cell.name}, which has no gate "
            "that keeps its state"
        )
    if not 2 <= longest < math.inf:
        raise ValueError(f"longest is {longest}; expected a number of at least 2")
    biases = [*_biases(module, "chrono_")]
    for b_ih, _ in biases:
        if longest > torch.finfo(b_ih.dtype).max:
            raise ValueError(f"longest is {longest}, more than the largest number of {b_ih.dtype}")
    with torch.no_grad():
        for b_ih, b_hh in biases:
            b_ih.zero_()
            b_hh.zero_()
            bias = _block(b_ih, cell, keep).uniform_(1, longest - 1, generator=generator).log_()
            if "i" in cell.block_names:
                _block(b_ih, cell, "i").copy_(-bias)
    return module


_TORCH_CELLS: dict[type[nn.Module], str] = {nn.LSTMCell: "lstm", nn.GRUCell: "gru"}


def _cell_of(module: nn.Module) -> Cell:
    name = None
    if isinstance(module, Fused):
        name = module._cell()
    elif isinstance(module, nn.RNNBase):
        name = module.mode.lower()
    elif isinstance(module, nn.RNNCell):
        name = f"rnn_{module.nonlinearity}"
    else:
        name = next((name for kind, name in _TORCH_CELLS.items() if isinstance(module, kind)), None)
    if name not in CELLS:
        raise ValueError(f"{_name(module)} is not a recurrent module")
    return CELLS[name]


def _name(module: nn.Module) -> str:
    return type(module).__name__


def _recurrent_weights(module: nn.Module) -> list[tuple[Tensor, list[Tensor]]]:
    """W_hh and the biases of each layer and direction."""
    suffixes = [""]
    if isinstance(module, nn.RNNBase):
        directions = ("", "_reverse") if module.bidirectional else ("",)
        suffixes = [f"_l{layer}{end}" for layer in range(module.num_layers) for end in directions]

    def parameter(name: str) -> Tensor:
        weight = module._parameters.get(name)
        if weight is None:
            raise ValueError(
                f"{name} of {_name(module)} is not a plain parameter: it is parametrized or pruned"
            )
        return weight

    biases = ("bias_ih", "bias_hh") if module.bias else ()
    return [
        (parameter(f"weight_hh{suffix}"), [parameter(f"{bias}{suffix}") for bias in biases])
        for suffix in suffixes
    ]


def _biases(module: nn.Module, function: str) -> Iterator[list[Tensor]]:
    for _, biases in _recurrent_weights(module):
        if not biases:
            raise ValueError(f"{function} needs biases; {_name(module)} has bias=False")
        yield biases


def _block(bias: Tensor, cell: Cell, name: str) -> Tensor:
    """The part of a bias that belongs to one gate."""
    return bias.chunk(cell.weight_blocks)[cell.block_names.index(name)]
