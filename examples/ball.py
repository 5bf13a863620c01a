"""Where does a bouncing ball go next?

A ball is thrown into a box. It falls, bounces, and passes behind a curtain. At every time a GRU sees
where the ball is, or nothing while the curtain hides it, and predicts the next position. Nobody tells
it about speed, gravity or walls.

The number is the mean distance from the predicted to the true position behind the curtain, for balls
that the model was not trained on. The box is 2 wide and 1 high. The baseline lets the ball fly on from
where it was last seen: it knows the speed and gravity, but the ball stops at a wall and does not
bounce. The figure shows both for six balls.
"""

from types import ModuleType
from typing import NamedTuple

import report
import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn

BOX, GRAVITY = torch.tensor([2.0, 1.0]), torch.tensor([0.0, -0.004])
CURTAIN = (0.8, 1.5)
TIMES = 64


class Settings(NamedTuple):
    balls: int
    hidden: int
    steps: int
    batch: int = 64
    rate: float = 8e-3


QUICK = Settings(balls=20_000, hidden=96, steps=1500)
FULL = Settings(balls=100_000, hidden=128, steps=8000)


def throw(balls: int, seed: int) -> Tensor:
    """The positions of balls, [time, ball, 2]. Every ball starts on the left of the curtain."""
    generator = torch.Generator().manual_seed(seed)
    position = torch.rand(balls, 2, generator=generator) * torch.tensor([0.6, 1.0])
    velocity = (torch.rand(balls, 2, generator=generator) - 0.5) * torch.tensor([0.12, 0.10])
    positions = []
    for _ in range(TIMES):
        velocity = velocity + GRAVITY
        position = position + velocity
        inside = position.clamp(torch.zeros(2), BOX)
        velocity = torch.where(position == inside, velocity, -velocity)
        position = 2 * inside - position  # a wall is a mirror
        positions.append(position)
    return torch.stack(positions)


def is_seen(positions: Tensor) -> Tensor:
    x = positions[..., :1]
    return (x < CURTAIN[0]) | (x > CURTAIN[1])


class Model(nn.Module):
    def __init__(self, package: ModuleType, hidden: int):
        super().__init__()
        self.rnn = package.GRU(3, hidden)
        self.head = nn.Linear(hidden, 2)

    def forward(self, positions: Tensor) -> Tensor:
        """Predict the positions from time 1 on."""
        seen = is_seen(positions)
        output, _ = self.rnn(torch.cat([positions * seen, seen], dim=-1))
        return self.head(output[:-1])


def fly_on(positions: Tensor) -> Tensor:
    """The baseline's positions from time 1 on."""
    seen, guess, velocity = is_seen(positions), positions[0], torch.zeros(2)
    guesses = [guess]
    for t in range(1, TIMES - 1):
        velocity = torch.where(seen[t], positions[t] - positions[t - 1], velocity) + GRAVITY
        guess = (torch.where(seen[t], positions[t], guess) + velocity).clamp(torch.zeros(2), BOX)
        guesses.append(guess)
    return torch.stack(guesses)


def distance(predicted: Tensor, positions: Tensor) -> Tensor:
    return (predicted - positions[1:]).norm(dim=-1, keepdim=True)


def draw(positions: Tensor, predicted: Tensor, flight: Tensor) -> plt.Figure:
    figure, axes = plt.subplots(2, 3, figsize=(12, 5), sharex=True, sharey=True, layout="constrained")
    for ball, axis in enumerate(axes.flat):
        true = positions[1:, ball]
        seen = is_seen(true)[:, 0]
        axis.axvspan(*CURTAIN, color="0.92")
        axis.plot(*true[seen].T, "o", ms=5, color="tab:blue", label="seen")
        axis.plot(*true[~seen].T, "o", ms=5, color="tab:blue", mfc="none", label="hidden")
        axis.plot(*flight[~seen, ball].T, "x", ms=5, color="0.45", label="baseline: no bounce")
        axis.plot(*predicted[~seen, ball].T, ".", color="tab:red", label="predicted")
        axis.set(xlim=(0, BOX[0]), ylim=(0, BOX[1]), aspect="equal", xticks=[0, 1, 2], yticks=[0, 1])
    figure.suptitle("Where is the ball behind the curtain?")
    axes[1, 1].set_xlabel("width of the box")
    axes[1, 0].set_ylabel("height of the box")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def main() -> None:
    arguments = report.parser(__doc__.splitlines()[0], "ball").parse_args()
    settings = QUICK if arguments.quick else FULL
    balls = throw(settings.balls, seed=1)

    def training(package: ModuleType, steps: report.Steps):
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(0)
        model = Model(package, settings.hidden)
        optimizer = torch.optim.Adam(model.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.rate, len(steps))
        for _ in steps.resume(model, optimizer, schedule, generator):
            batch = balls[:, torch.randint(settings.balls, [settings.batch], generator=generator)]
            loss = distance(model(batch), batch).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            yield loss.item()
        return model

    trained = report.train(training, settings.steps, arguments)
    new_balls = throw(1000, seed=2)
    hidden = ~is_seen(new_balls[1:])
    with torch.no_grad():
        predicted, flight = trained.model(new_balls), fly_on(new_balls)
    result = report.Result(
        system="ball",
        metric="distance behind the curtain",
        value=distance(predicted, new_balls)[hidden].mean().item(),
        baseline=distance(flight, new_balls)[hidden].mean().item(),
        baseline_name="flight without a bounce",
        better="lower",
    )
    report.finish(result, trained, draw(new_balls, predicted, flight), arguments)


if __name__ == "__main__":
    main()
