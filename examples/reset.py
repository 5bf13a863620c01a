"""A recurrent PPO update: the Python loop over steps that zeroes the states of finished episodes, as
CleanRL writes it, and the same in one call with reset=. The same loss and gradients; the time of each.
"""

import statistics
import time
from typing import NamedTuple

import torch
from torch import nn
from torch.distributions import Categorical

import rnnfast

STEPS, ENVS, FEATURES, HIDDEN, ACTIONS = 128, 8, 128, 128, 6


class Agent(nn.Module):
    def __init__(self, lstm):
        super().__init__()
        self.lstm = lstm
        self.actor, self.critic = nn.Linear(HIDDEN, ACTIONS), nn.Linear(HIDDEN, 1)

    def by_loop(self, features, state, done):
        outputs = []
        for x, d in zip(features, done.float(), strict=True):
            keep = (1 - d).view(1, -1, 1)
            y, state = self.lstm(x[None], (keep * state[0], keep * state[1]))
            outputs.append(y)
        return torch.cat(outputs)

    def by_call(self, features, state, done):
        return self.lstm(features, state, reset=done)[0]


def loss_of(agent, hidden, rollout):
    """PPO's clipped objective, the value loss and the entropy bonus."""
    policy, value = Categorical(logits=agent.actor(hidden)), agent.critic(hidden).squeeze(-1)
    ratio = (policy.log_prob(rollout["action"]) - rollout["log_prob"]).exp()
    advantage = rollout["advantage"]
    clipped = torch.max(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2)).mean()
    return clipped + 0.25 * (value - rollout["return"]).square().mean() - 0.01 * policy.entropy().mean()


class Comparison(NamedTuple):
    same_loss: bool
    same_gradients: bool
    torch_loop: float  # seconds of an update
    loop: float
    call: float


def compare(seconds: float = 1.0) -> Comparison:
    torch.manual_seed(0)
    agent = Agent(rnnfast.LSTM(FEATURES, HIDDEN))
    torchs = Agent(nn.LSTM(FEATURES, HIDDEN))
    torchs.load_state_dict(agent.state_dict())
    features = torch.randn(STEPS, ENVS, FEATURES)
    state = (torch.randn(1, ENVS, HIDDEN), torch.randn(1, ENVS, HIDDEN))
    done = torch.rand(STEPS, ENVS) < 0.02
    rollout = {name: torch.randn(STEPS, ENVS) for name in ("log_prob", "advantage", "return")}
    rollout["action"] = torch.randint(ACTIONS, (STEPS, ENVS))

    def update(agent, run):
        agent.zero_grad()
        loss = loss_of(agent, run(features, state, done), rollout)
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in agent.parameters()]

    ways = {
        "torch_loop": lambda: update(torchs, torchs.by_loop),
        "loop": lambda: update(agent, agent.by_loop),
        "call": lambda: update(agent, agent.by_call),
    }
    (truth, gradients), _, (loss, others) = (way() for way in ways.values())
    times = {name: [] for name in ways}
    for _ in range(3):  # in turns: each meets the same moods of the machine
        for name, way in ways.items():
            way()
            end = time.perf_counter() + seconds / 3
            while not times[name] or time.perf_counter() < end:
                start = time.perf_counter()
                way()
                times[name].append(time.perf_counter() - start)
    return Comparison(
        same_loss=torch.allclose(loss, truth, rtol=1e-5),
        same_gradients=all(
            torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(others, gradients, strict=True)
        ),
        **{name: statistics.median(taken) for name, taken in times.items()},
    )


if __name__ == "__main__":
    found = compare()
    print("same loss:     ", found.same_loss)
    print("same gradients:", found.same_gradients)
    print(f"loop over torch.nn.LSTM: {1e3 * found.torch_loop:6.2f} ms an update")
    print(f"loop over rnnfast.LSTM:  {1e3 * found.loop:6.2f} ms")
    print(f"one call with reset=:    {1e3 * found.call:6.2f} ms, {found.torch_loop / found.call:.1f}x")
