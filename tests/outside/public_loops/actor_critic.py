"""Actor-critic: the data come from the policy itself, and the environments go on from step to step."""

from functools import partial

import torch
from torch import nn
from torch.distributions import Categorical

from steploop import (
    Optimizer,
    TrainState,
    backward_scaled,
    fold_in,
    forward_loss,
    optimizer_step,
    unscale_and_clip,
)

SEED, STEPS, ENVIRONMENTS, HORIZON = 17, 20, 8, 5


class ActorCritic(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(SEED)
        self.body = nn.Sequential(nn.Linear(2, 16), nn.Tanh())
        self.actor, self.critic = nn.Linear(16, 3), nn.Linear(16, 1)

    def forward(self, places):
        hidden = self.body(places)
        return Categorical(logits=self.actor(hidden), validate_args=False), self.critic(hidden).squeeze(1)


def moved(places, actions):
    """Carts on a line, pushed left, not at all or right; the reward is high near the origin. One in ten starts anew."""
    position, speed = places.unbind(1)
    speed = 0.9 * speed + 0.2 * (actions - 1) + 0.05 * torch.randn(len(places))
    position = position + speed
    anew = torch.rand(len(places)) < 0.1
    places = torch.stack([torch.where(anew, 2 * torch.rand(len(places)) - 1, position), speed], dim=1)
    return places, -position.square(), anew


def rollout_loss(model, places, usual_reward):
    """Act for a few moments, then compare the returns with what the critic expected."""
    rewards, ends, values, likelihoods, entropies = [], [], [], [], []
    for _ in range(HORIZON):
        policy, value = model(places)
        actions = policy.sample()
        values.append(value)
        likelihoods.append(policy.log_prob(actions))
        entropies.append(policy.entropy())
        places, reward, end = moved(places, actions)
        rewards.append(reward - usual_reward)
        ends.append(end)
    with torch.no_grad():
        expected = model(places)[1]
    returns = []
    for reward, end in zip(reversed(rewards), reversed(ends), strict=True):
        expected = reward + 0.95 * torch.where(end, 0.0, expected)
        returns.insert(0, expected)
    advantages = torch.stack(returns) - torch.stack(values)
    policy_loss = -(torch.stack(likelihoods) * advantages.detach()).mean()
    loss = policy_loss + 0.5 * advantages.square().mean() - 0.01 * torch.stack(entropies).mean()
    return loss, places, torch.stack(rewards).mean() + usual_reward


def batches():
    return list(range(STEPS))


def by_hand(data):
    model = ActorCritic()
    optimizer = torch.optim.RMSprop(model.parameters(), lr=7e-3)
    places, usual_reward = torch.zeros(ENVIRONMENTS, 2), torch.zeros(())
    for step in data:
        torch.manual_seed(fold_in(SEED, step, 0))
        optimizer.zero_grad()
        loss, places, reward = rollout_loss(model, places, usual_reward)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        usual_reward = 0.9 * usual_reward + 0.1 * reward
    return {**model.state_dict(), "places": places, "usual reward": usual_reward}


def objective(model, _, *, places, usual_reward):
    loss, places, reward = rollout_loss(model, places, usual_reward)
    return loss, {"places": places, "usual_reward": 0.9 * usual_reward + 0.1 * reward}, ENVIRONMENTS


def initial():
    carry = {"places": torch.zeros(ENVIRONMENTS, 2), "usual_reward": torch.zeros(())}
    return TrainState.create(ActorCritic(), Optimizer(torch.optim.RMSprop, lr=7e-3), seed=SEED, carry=carry)


def train_step(state, step):
    state = forward_loss(state, step, partial(objective, **state.carry))
    state = state.with_carry(state.outputs)
    state = backward_scaled(state)
    state = unscale_and_clip(state, max_norm=0.5)
    return optimizer_step(state)


def result(state):
    carry = state.carry
    return {**state.params, "places": carry["places"], "usual reward": carry["usual_reward"]}
