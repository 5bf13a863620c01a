"""Forecast: how much electricity will England and Wales use in each half hour of the next day?

The data are the half-hourly loads of twelve weeks in 2000 (Taylor 2003, in pmdarima). The model is
DeepAR (Salinas et al. 2020): a GRU reads the last value and the calendar, and gives a Student t
distribution of the next value. A value is the load minus the load one week before. A forecast draws a
value and feeds it back, 48 times, in many paths at once. The number is the normalised deviation of the
paths' median: the sum of the absolute errors in percent of the sum of the loads. Training ends before
the last two weeks, and each forecast lies in them. The baseline repeats the load of one week before.
The figure shows quantiles of the paths, and the error of each of the 48 steps.
"""

import ast
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import matplotlib.pyplot as plt
import report
import torch
from torch import Tensor
from torch.distributions import StudentT

import rnnfast

DAY, WEEK = 48, 336  # steps of half an hour
CONTEXT = 2 * DAY  # steps that the network reads before a forecast
TEST = 2 * WEEK
QUANTILES = (0.1, 0.5, 0.9)


class Settings(NamedTuple):
    steps: int
    rate: float
    paths: int
    every: int  # steps from the start of one forecast to the next
    hidden: int = 24  # more units learn twelve weeks by heart
    batch: int = 128


SETTINGS = Settings(steps=2500, rate=1e-3, paths=500, every=2)
QUICK = Settings(steps=400, rate=3e-3, paths=100, every=4)


class DeepAR(torch.nn.Module):
    def __init__(self, package: ModuleType, inputs: int, s: Settings) -> None:
        super().__init__()
        self.gru = package.GRU(inputs, s.hidden)
        self.head = torch.nn.Linear(s.hidden, 3)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[StudentT, Tensor]:
        y, state = self.gru(x, state)
        freedom, location, scale = self.head(y).unbind(-1)
        softplus = torch.nn.functional.softplus
        return StudentT(2 + softplus(freedom), location, softplus(scale) + 1e-3), state


class Series(NamedTuple):
    """The loads from the second week on, and what the network reads and predicts."""

    load: Tensor
    week_before: Tensor
    scale: Tensor  # of a difference
    difference: Tensor  # load minus week_before, scaled
    known: Tensor  # [T, covariates], all known one day ahead


def electricity() -> Series:
    (package,) = find_spec("pmdarima").submodule_search_locations
    tree = ast.parse((Path(package) / "datasets/taylor.py").read_text())
    values = next(
        node for node in ast.walk(tree) if isinstance(node, ast.List) and len(node.elts) > WEEK
    )
    every_load = torch.tensor(ast.literal_eval(values), dtype=torch.float32)
    load, week_before = every_load[WEEK:], every_load[:-WEEK]
    difference = load - week_before
    scale = difference[:-TEST].std()
    difference = difference / scale
    day_before = torch.cat([torch.zeros(DAY), difference[:-DAY]])
    step = torch.arange(len(load))
    angle = 2 * torch.pi * step / DAY
    clock = torch.stack([angle.sin(), angle.cos(), (2 * angle).sin(), (2 * angle).cos()], dim=-1)
    weekday = torch.nn.functional.one_hot(step // DAY % 7, 7)
    level = (week_before - load[:-TEST].mean()) / load[:-TEST].std()
    known = torch.cat([day_before[:, None], level[:, None], clock, weekday], dim=-1)
    return Series(load, week_before, scale, difference, known)


def windows(series: Series, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Inputs [length, starts, features] and the values to predict."""
    t = starts + torch.arange(length)[:, None]
    return torch.cat([series.difference[t - 1, None], series.known[t]], dim=-1), series.difference[t]


def training(package: ModuleType, steps: report.Steps, series: Series, s: Settings) -> Iterator[float]:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = DeepAR(package, 1 + series.known.shape[1], s)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, s.rate, total_steps=len(steps))
    last = len(series.load) - TEST - CONTEXT - DAY
    for _ in steps.resume(model, optimizer, schedule, generator):
        starts = torch.randint(1, last + 1, (s.batch,), generator=generator)
        x, target = windows(series, starts, CONTEXT + DAY)
        # Both signs are examples, as if a difference were as likely as its negative.
        sign = 2.0 * torch.randint(2, (s.batch,), generator=generator) - 1
        x[..., :2] *= sign[:, None]
        loss = -model(x)[0].log_prob(sign * target).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        yield loss.item()
    return model.eval()


@torch.inference_mode()
def forecasts(model: DeepAR, series: Series, origins: Tensor, paths: int) -> Tensor:
    """The quantiles of the load, [DAY, origins, quantiles]."""
    torch.manual_seed(1)
    x, _ = windows(series, origins - CONTEXT, CONTEXT)
    _, state = model(x)
    state = state.repeat_interleave(paths, dim=1)
    value = series.difference[origins - 1].repeat_interleave(paths)
    sampled = []
    with rnnfast.frozen(model):
        for step in range(DAY):
            known = series.known[origins + step].repeat_interleave(paths, dim=0)
            distribution, state = model(torch.cat([value[:, None], known], dim=-1)[None], state)
            value = distribution.sample()[0]
            sampled.append(value.view(-1, paths))
    difference = torch.stack(sampled).quantile(torch.tensor(QUANTILES), dim=-1).movedim(0, -1)
    t = origins + torch.arange(DAY)[:, None]
    return difference * series.scale + series.week_before[t][..., None]


def deviation(forecast: Tensor, load: Tensor, dim: int | None = None) -> Tensor:
    """The normalised deviation in percent."""
    return 100 * (forecast - load).abs().sum(dim) / load.sum(dim)


def draw(quantiles: Tensor, series: Series, origins: Tensor) -> plt.Figure:
    """Forecasts of one day after the other, above the error of each step ahead."""
    t = origins + torch.arange(DAY)[:, None]
    figure, (above, below) = plt.subplots(
        2, figsize=(11, 8), layout="constrained", height_ratios=[3, 2]
    )
    daily = ((origins - origins[0]) % DAY == 0).nonzero()[-7:, 0]
    before = series.week_before[t]
    low, median, high = (quantiles - before[..., None])[:, daily].permute(2, 1, 0).flatten(1) / 1000
    load = (series.load[t] - before)[:, daily].T.flatten() / 1000
    days = 1 + torch.arange(len(load)) / DAY
    above.fill_between(days, low, high, color="tab:blue", alpha=0.3, label="80 percent of the paths")
    above.plot(days, median, color="tab:blue", label="median of the paths")
    above.axhline(0, linestyle="--", color="tab:orange", label="one week before")
    above.plot(days, load, color="black", linewidth=1, label="load")
    above.set(title="Seven forecasts of one day each", xlabel="day of the last week")
    above.set_ylabel("load minus load one week before, GW")
    above.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    hours = torch.arange(1, DAY + 1) / 2
    steps = deviation(quantiles[..., 1], series.load[t], dim=1)
    below.plot(hours, steps, color="tab:blue", label="median of the paths")
    steps = deviation(before, series.load[t], dim=1)
    below.plot(hours, steps, "--", color="tab:orange", label="one week before")
    below.set(xlabel="hours ahead", ylabel="normalised deviation, percent", ylim=(0, None))
    below.set_xticks(range(0, 25, 6))
    below.legend()
    return figure


def main() -> None:
    arguments = report.parser(__doc__.partition("\n")[0], "forecast").parse_args()
    settings = QUICK if arguments.quick else SETTINGS
    series = electricity()
    trained = report.train(partial(training, series=series, s=settings), settings.steps, arguments)
    origins = torch.arange(len(series.load) - TEST, len(series.load) - DAY + 1, settings.every)
    quantiles = forecasts(trained.model, series, origins, settings.paths)
    t = origins + torch.arange(DAY)[:, None]
    load = series.load[t]
    covered = (quantiles[..., 0] <= load) & (load <= quantiles[..., 2])
    print(f"{100 * covered.double().mean():.0f} percent of the loads are in the band of 80 percent")
    value, baseline = (deviation(f, load).item() for f in (quantiles[..., 1], series.week_before[t]))
    numbers = "normalised deviation, percent", value, baseline, "one week before", "lower"
    result = report.Result("forecast", *numbers)
    report.finish(result, trained, draw(quantiles, series, origins), arguments)


if __name__ == "__main__":
    main()
