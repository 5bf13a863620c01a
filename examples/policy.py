"""A policy with memory balances a pole that it sees without velocities.

CartPole-v1 (Gymnasium) gives a point for each step that the pole stands, at most 500. Here the policy
sees the positions of the cart and the pole but not their velocities, so one observation does not tell
which way the pole falls. A GRU can remember earlier positions. It learns by recurrent PPO (Schulman et
al. 2017). The rollout calls the GRU step by step. The update calls it once for many steps, with reset=
where an episode begins. The number is the mean return of 64 new episodes. It must be higher than that
of a policy without memory, which learns by the same code from as many steps; 500 counts as solved.
The figure shows both trainings.
"""

from typing import NamedTuple

import gymnasium
import matplotlib.pyplot as plt
import numpy as np
import report
import torch

import rnnfast

ENVIRONMENTS, STEPS, HIDDEN = 64, 64, 64
EPOCHS, MINIBATCHES, RATE = 4, 4, 3e-3
GAMMA, LAMBDA, CLIP, ENTROPY = 0.99, 0.95, 0.2, 0.01  # a reward is 1 - GAMMA: values are at most 1
QUICK, FULL = 80, 300  # iterations: STEPS steps in ENVIRONMENTS environments, and an update


class Agent(torch.nn.Module):
    """A policy and a value function on top of a GRU, or of a layer without memory."""

    def __init__(self, gru: type[torch.nn.GRU] | None):
        super().__init__()
        linear = torch.nn.Linear
        self.first = gru(2, HIDDEN) if gru else torch.nn.Sequential(linear(2, HIDDEN), torch.nn.Tanh())
        self.second = torch.nn.Sequential(linear(HIDDEN, HIDDEN), torch.nn.Tanh())
        self.policy, self.value = linear(HIDDEN, 2), linear(HIDDEN, 1)

    def forward(self, x: torch.Tensor, state: torch.Tensor, begin: torch.Tensor):
        """Log-probabilities [T, B, 2], values [T, B], next state; `begin` [T, B] marks first steps."""
        if isinstance(self.first, rnnfast.GRU):
            y, state = self.first(x, state, reset=begin)
        elif isinstance(self.first, torch.nn.GRU):
            y, state = loop(self.first, x, state, begin)
        else:
            y = self.first(x)
        y = self.second(y)
        return self.policy(y).log_softmax(-1), self.value(y).squeeze(-1), state


def loop(gru: torch.nn.GRU, x: torch.Tensor, state: torch.Tensor, begin: torch.Tensor):
    """What reset= does, for torch.nn: a call for each step, and zero states where an episode begins."""
    outputs = []
    for step, first in zip(x.split(1), begin, strict=True):
        y, state = gru(step, state * ~first[:, None])
        outputs.append(y)
    return torch.cat(outputs), state


def visible(observation: np.ndarray) -> torch.Tensor:
    """The positions of cart and pole, [1, B, 2]; an episode goes on while they are within -1 and 1."""
    return torch.from_numpy(observation[:, [0, 2]])[None] / torch.tensor([2.4, 0.21])


class Rollout(NamedTuple):
    """Tensors [T, B, ...] of T steps in B environments."""

    x: torch.Tensor
    begin: torch.Tensor  # the step is the first of an episode
    live: torch.Tensor  # the action has an effect
    action: torch.Tensor
    log_prob: torch.Tensor
    advantage: torch.Tensor
    target: torch.Tensor  # of the value function


def advantages(outcomes: list[tuple], next_value: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimates [T, B], and the values that they imply."""
    advantage, results = np.zeros_like(next_value), []
    for reward, value, terminated, ended in reversed(outcomes):
        error = reward + GAMMA * next_value * ~terminated - value
        advantage = error + GAMMA * LAMBDA * advantage * ~ended
        results.insert(0, (advantage, advantage + value))
        next_value = value
    return torch.from_numpy(np.array(results, np.float32)).unbind(1)


def rollouts(agent: Agent, generator: torch.Generator):
    """Act for ever; yield the state before a rollout, the rollout, and the returns of its episodes."""
    environments = gymnasium.make_vec("CartPole-v1", ENVIRONMENTS, "vector_entry_point")
    x = visible(environments.reset(seed=0)[0])
    state, score = torch.zeros(1, ENVIRONMENTS, HIDDEN), np.zeros(ENVIRONMENTS)
    begin = live = torch.ones(1, ENVIRONMENTS, dtype=torch.bool)
    while True:
        first_state, inputs, outcomes, finished = state, [], [], []
        with torch.no_grad(), rnnfast.frozen(agent):
            for _ in range(STEPS):
                log_policy, value, state = agent(x, state, begin)
                action = torch.multinomial(log_policy[0].exp(), 1, generator=generator)
                observation, reward, terminated, truncated, _ = environments.step(action[:, 0].numpy())
                log_prob = log_policy[0].gather(-1, action)
                inputs.append((x, begin, live, action.T, log_prob.T))
                ended = terminated | truncated
                outcomes.append((reward * (1 - GAMMA), value[0].numpy(), terminated, ended))
                score += reward
                finished += score[ended].tolist()
                score *= ~ended
                # In the step after an end, the environment ignores the action and begins an episode.
                x, begin, live = visible(observation), ~live, torch.from_numpy(~ended)[None]
            last_value = agent(x, state, begin)[1][0].numpy()
        tensors = map(torch.cat, zip(*inputs, strict=True))
        yield first_state, Rollout(*tensors, *advantages(outcomes, last_value)), finished


def loss_of(agent: Agent, state: torch.Tensor, batch: Rollout) -> torch.Tensor:
    """PPO's clipped objective, the error of the values and the entropy bonus."""
    log_policy, value, _ = agent(batch.x, state, batch.begin)
    log_prob = log_policy.gather(-1, batch.action[..., None]).squeeze(-1)
    ratio = (log_prob - batch.log_prob).exp()
    advantage = batch.advantage - batch.advantage[batch.live].mean()
    advantage = advantage / (batch.advantage[batch.live].std() + 1e-8)
    gain = torch.min(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
    entropy = -(log_policy.exp() * log_policy).sum(-1)
    return (-gain + 0.5 * (value - batch.target).square() - ENTROPY * entropy)[batch.live].mean()


def training(gru: type[torch.nn.GRU] | None, steps: report.Steps):
    """Recurrent PPO; the result is the agent and the mean return of each iteration's episodes."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    agent = Agent(gru)
    optimizer = torch.optim.Adam(agent.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, len(steps))
    acting, curve = rollouts(agent, generator), []
    for _ in range(len(steps)):
        state, rollout, finished = next(acting)
        for _ in range(EPOCHS):
            for rows in torch.randperm(ENVIRONMENTS, generator=generator).chunk(MINIBATCHES):
                optimizer.zero_grad()
                loss = loss_of(agent, state[:, rows], Rollout(*(series[:, rows] for series in rollout)))
                loss.backward()
                torch.nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
                optimizer.step()
        schedule.step()
        curve.append(np.mean(finished) if finished else np.nan)
        yield loss.item()
    return agent, curve


@torch.no_grad()
def evaluate(agent: Agent, episodes: int = 64) -> float:
    """The mean return of new episodes, with the likeliest action of each step."""
    environments = gymnasium.make_vec("CartPole-v1", episodes, "vector_entry_point")
    observation, _ = environments.reset(seed=1)
    state, never = torch.zeros(1, episodes, HIDDEN), torch.zeros(1, episodes, dtype=torch.bool)
    running, score = np.ones(episodes, bool), np.zeros(episodes)
    while running.any():
        log_policy, _, state = agent(visible(observation), state, never)
        action = log_policy[0].argmax(-1).numpy()
        observation, reward, terminated, truncated, _ = environments.step(action)
        score += reward * running
        running &= ~(terminated | truncated)
    return score.mean()


def figure_of(curves: dict[str, list[float]]) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for (name, curve), colour in zip(curves.items(), ("tab:blue", "tab:red"), strict=True):
        steps = ENVIRONMENTS * STEPS * np.arange(1, len(curve) + 1) / 1000
        axes.plot(steps, curve, color=colour, label=name)
    axes.axhline(500, color="gray", ls=":", label="solved: 500")
    axes.set(xlabel="environment steps (thousands)", ylabel="mean return of an iteration's episodes")
    axes.set(ylim=(0, 530), title="PPO on CartPole-v1 without velocities")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 0.12))
    return figure


def main() -> None:
    arguments = report.parser(__doc__.partition("\n")[0], "policy", checkpoint=False).parse_args()
    iterations = QUICK if arguments.quick else FULL
    trained = report.train(lambda package, steps: training(package.GRU, steps), iterations, arguments)
    print("the same training without memory:")
    plain = report.train(lambda _, steps: training(None, steps), iterations, arguments, share=0)
    (agent, curve), (plain_agent, plain_curve) = trained.model, plain.model
    result = report.Result(
        system="policy",
        metric="mean return",
        value=evaluate(agent),
        baseline=evaluate(plain_agent),
        baseline_name="without memory",
        better="higher",
    )
    report.finish(
        result, trained, figure_of({"with memory": curve, "without memory": plain_curve}), arguments
    )


if __name__ == "__main__":
    main()
