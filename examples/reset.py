"""A recurrent PPO update, written in two ways that give the same loss and gradients.

The first way is CleanRL's Python loop over steps, which zeroes the states of finished episodes. The
second way is one call with reset=. The program compares the results and the times.
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


class Times(NamedTuple):
    """Median seconds of each way."""

    torch_loop: float  # loop over steps of torch.nn.LSTM
    loop: float  # loop over steps of rnnfast.LSTM
    call: float  # one call of rnnfast.LSTM

    @property
    def ratio(self) -> float:
        return self.torch_loop / self.call


class Comparison(NamedTuple):
    same_loss: bool
    same_gradients: bool
    recurrence: Times  # forward and backward of the LSTM alone
    update: Times  # forward and backward of the LSTM, the heads and the loss


def time_in_turns(ways, seconds):
    """Time the ways in turns, so that a change of the machine's speed affects all of them."""
    samples = [[] for _ in ways]
    for _ in range(3):
        for way, times in zip(ways, samples, strict=True):
            way()
            end = time.perf_counter() + seconds / 3
            while not times or time.perf_counter() < end:
                start = time.perf_counter()
                way()
                times.append(time.perf_counter() - start)
    return Times(*(statistics.median(times) for times in samples))


def compare(seconds: float = 1.0) -> Comparison:
    torch.manual_seed(0)
    agent = Agent(rnnfast.LSTM(FEATURES, HIDDEN))
    torch_agent = Agent(nn.LSTM(FEATURES, HIDDEN))
    torch_agent.load_state_dict(agent.state_dict())
    features = torch.randn(STEPS, ENVS, FEATURES)
    state = (torch.randn(1, ENVS, HIDDEN), torch.randn(1, ENVS, HIDDEN))
    done = torch.rand(STEPS, ENVS) < 0.02
    rollout = {name: torch.randn(STEPS, ENVS) for name in ("log_prob", "advantage", "return")}
    rollout["action"] = torch.randint(ACTIONS, (STEPS, ENVS))
    d_hidden = torch.randn(STEPS, ENVS, HIDDEN)

    def update(agent, run):
        agent.zero_grad()
        loss = loss_of(agent, run(features, state, done), rollout)
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in agent.parameters()]

    def recur(agent, run):
        hidden = run(features, state, done)
        return torch.autograd.grad(hidden, list(agent.lstm.parameters()), d_hidden)

    runs = ((torch_agent, torch_agent.by_loop), (agent, agent.by_loop), (agent, agent.by_call))
    (torch_loss, torch_gradients), _, (loss, gradients) = (update(*way) for way in runs)
    return Comparison(
        same_loss=torch.allclose(loss, torch_loss, rtol=1e-5),
        same_gradients=all(
            torch.allclose(a, b, rtol=1e-4, atol=1e-6)
            for a, b in zip(gradients, torch_gradients, strict=True)
        ),
        recurrence=time_in_turns([lambda way=way: recur(*way) for way in runs], seconds),
        update=time_in_turns([lambda way=way: update(*way) for way in runs], seconds),
    )


if __name__ == "__main__":
    comparison = compare()
    print("same loss:     ", comparison.same_loss)
    print("same gradients:", comparison.same_gradients)
    for name in ("recurrence", "update"):
        times = getattr(comparison, name)
        print(f"the {name}:")
        print(f"  loop over torch.nn.LSTM: {1e3 * times.torch_loop:6.2f} ms")
        print(f"  loop over rnnfast.LSTM:  {1e3 * times.loop:6.2f} ms")
        print(f"  one call with reset=:    {1e3 * times.call:6.2f} ms, {times.ratio:.1f}x")
