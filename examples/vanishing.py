"""Which recurrent networks remember two numbers over a long sequence, and why?

In the adding problem (Le et al. 2015, after Hochreiter and Schmidhuber 1997), a sequence has T random
numbers from 0 to 1. Two of them are marked, and the answer is their sum. Four networks learn it at
several lengths: an RNN with tanh, an RNN with ReLU whose recurrent weights start as the identity (Le et
al. 2015), a GRU and an LSTM. The gates of the last two start so that they keep a number for up to T
steps (Tallec and Ollivier 2018). The number is the mean squared error of the GRU at the largest T. It
must be lower than the variance of the answer, about 1/6, which is the error of the best constant. The
figure shows who learns at which T, and the norm of the gradient with respect to the state of each step.
Where it vanishes, an early number cannot change the weights.
"""

import copy
import math
from collections.abc import Generator
from functools import partial
from types import ModuleType
from typing import NamedTuple

import matplotlib.pyplot as plt
import report
import torch
from rich.console import Console
from rich.table import Table

import rnnfast

CELLS = {"RNN tanh": "tab:red", "RNN ReLU": "tab:orange", "GRU": "tab:blue", "LSTM": "tab:green"}
CLIP = 1.0  # the largest norm of a model's gradient


class Settings(NamedTuple):
    lengths: tuple[int, ...]
    steps: int
    hidden: int = 32
    batch: int = 64


QUICK = Settings(lengths=(25, 50, 100), steps=700)
FULL = Settings(lengths=(50, 150, 400, 750), steps=3000)


class Adder(torch.nn.Module):
    """A recurrent layer that reads the sequence, and a linear layer that reads its last state."""

    def __init__(self, package: ModuleType, cell: str, length: int, hidden: int):
        super().__init__()
        if cell in ("RNN tanh", "RNN ReLU"):
            self.rnn = package.RNN(2, hidden, nonlinearity=cell.removeprefix("RNN ").lower())
        else:
            self.rnn = getattr(package, cell)(2, hidden)
        self.head = torch.nn.Linear(hidden, 1)
        if cell == "RNN ReLU":
            rnnfast.init.identity_(self.rnn)
        if cell in ("GRU", "LSTM"):
            rnnfast.init.chrono_(self.rnn, length)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(x)[0][-1]).squeeze(-1)


def rate(cell: str, length: int) -> float:
    """The learning rate. Over many steps, small changes of the ReLU's weights let it explode."""
    return min(5e-3, 20 / length**2) if cell == "RNN ReLU" else 1e-2


def adding_problem(
    length: int, batch: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences [T, B, 2] of numbers and marks, one mark in each half, and the sums [B]."""
    numbers = torch.rand(length, batch, generator=generator)
    half, rows = length // 2, torch.arange(batch)
    marks = torch.zeros(length, batch)
    marks[torch.randint(0, half, (batch,), generator=generator), rows] = 1
    marks[torch.randint(half, length, (batch,), generator=generator), rows] = 1
    return torch.stack([numbers, marks], -1), (numbers * marks).sum(0)


def error(model: Adder, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.mse_loss(model(x), y)


def gradient_norms(model: Adder, x: torch.Tensor, y: torch.Tensor) -> list[float]:
    """The norm of dL/dh_t for every step t."""
    model = copy.deepcopy(model)
    rnnfast.accelerate(model, report=None)  # gradient_flow needs rnnfast's class of the layer
    with rnnfast.gradient_flow(model) as flow:
        error(model, x, y).backward()
    return flow.records[0].h[0, 0].tolist()


class Study(NamedTuple):
    """What the training returns; a key is a cell and a length."""

    untrained: dict[tuple[str, int], Adder]
    models: dict[tuple[str, int], Adder]
    largest: dict[tuple[str, int], float]  # the largest norm of a gradient, before it was clipped


def training(settings: Settings, package: ModuleType, steps: report.Steps) -> Generator:
    """Train all cells at all lengths side by side; a loss is the mean over them. Return the study."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    keys = [(cell, length) for cell in CELLS for length in settings.lengths]
    models = {key: Adder(package, *key, settings.hidden) for key in keys}
    untrained = copy.deepcopy(models)
    groups = [{"params": model.parameters(), "lr": rate(*key)} for key, model in models.items()]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(steps))
    largest = dict.fromkeys(models, 0.0)
    parts = *models.values(), optimizer, schedule, generator, largest
    for _ in steps.resume(*parts):
        batches = {T: adding_problem(T, settings.batch, generator) for T in settings.lengths}
        optimizer.zero_grad()
        losses = []
        for key, model in models.items():
            loss = error(model, *batches[key[1]])
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item()
            largest[key] = max(largest[key], norm)
            if not math.isfinite(norm):
                model.zero_grad()  # the gradient overflowed and has no direction: Adam skips this model
            losses.append(loss.item())
        optimizer.step()
        schedule.step()
        yield sum(losses) / len(losses)
    return Study(untrained, models, largest)


def figure_of(study: Study, errors: dict[tuple[str, int], float], chance: float) -> plt.Figure:
    """Left: the error of each cell at each length. Right: its gradients at the largest length."""
    lengths = sorted({length for _, length in errors})
    x, y = adding_problem(lengths[-1], 100, torch.Generator().manual_seed(3))
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.2), layout="constrained")
    for cell, colour in CELLS.items():
        key = (cell, lengths[-1])
        right.plot(gradient_norms(study.untrained[key], x, y), "--", color=colour, lw=1)
        curves = [errors[cell, T] for T in lengths], gradient_norms(study.models[key], x, y)
        # A value that is not finite has no place in the figure.
        labels = [cell + " (not finite)" * (not all(map(math.isfinite, curve))) for curve in curves]
        left.plot(lengths, curves[0], "o-", color=colour, label=labels[0])
        right.plot(curves[1], color=colour, label=labels[1])
    # A step backwards multiplies the gradient by the recurrent weights: a factor above 1 explodes.
    factor = 1 + 10 / lengths[-1]
    explosive = copy.deepcopy(study.untrained["RNN ReLU", lengths[-1]])
    with torch.no_grad():
        explosive.rnn.weight_hh_l0.mul_(factor)
    right.plot(gradient_norms(explosive, x, y), "k:", label=f"RNN ReLU, {factor:.3g} × identity")
    left.axhline(chance, color="gray", ls=":", label="constant answer")
    left.set(xscale="log", yscale="log", xlabel="length T", ylabel="mean squared error")
    left.set_ylim(top=1)  # a model that exploded lies above
    left.set_xticks(lengths, lengths)
    left.minorticks_off()
    left.set_title("Who learns the adding problem")
    right.set(yscale="log", ylim=(1e-10, 1e7), xlabel="step t", ylabel=r"norm of $dL/dh_t$")
    right.set_title(f"Gradients of each step, T={lengths[-1]} (dashed: untrained)")
    left.legend(fontsize=8)
    right.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    left.grid(alpha=0.3)
    right.grid(alpha=0.3)
    return figure


def main() -> None:
    arguments = report.parser(__doc__.partition("\n")[0], "vanishing").parse_args()
    settings = QUICK if arguments.quick else FULL
    trained = report.train(partial(training, settings), settings.steps, arguments)
    study: Study = trained.model

    generator = torch.Generator().manual_seed(2)
    errors, constant = {}, {}  # `constant` has the error of the best constant answer
    for length in settings.lengths:
        x, y = adding_problem(length, 1000, generator)
        constant[length] = y.var(correction=0).item()
        with torch.no_grad():
            errors |= {(cell, length): error(study.models[cell, length], x, y).item() for cell in CELLS}

    table = Table("cell", *(f"T={length}" for length in settings.lengths), "largest gradient")
    for cell in CELLS:
        largest = max(study.largest[cell, length] for length in settings.lengths)
        table.add_row(cell, *(f"{errors[cell, T]:.5f}" for T in settings.lengths), f"{largest:.2g}")
    Console().print(table)
    print(f"The last column is the largest norm before clipping. Clipping limits it to {CLIP:g}.")

    longest = settings.lengths[-1]
    result = report.Result(
        system="vanishing",
        metric=f"mean squared error of the GRU at T={longest}",
        value=errors["GRU", longest],
        baseline=constant[longest],
        baseline_name="constant answer",
        better="lower",
    )
    report.finish(result, trained, figure_of(study, errors, constant[longest]), arguments)


if __name__ == "__main__":
    main()
