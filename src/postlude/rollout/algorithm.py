"""What an algorithm of reinforcement learning is: rewards of a round of samples in, streams of their tokens out.

The loop, the trainer and the objective are the same for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from postlude.data.document import REFERENCE_LOGP
from postlude.objectives.actor_critic import RETURN, VALUE
from postlude.objectives.policy import ADVANTAGE, OLD_LOGP
from postlude.rollout.advantages import Baseline, Scale, generalized, relative, whiten

Streams = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Scored:
    """The samples of a round, all arrays over each one's sampled tokens."""

    rewards: Sequence[float]
    groups: Sequence[int]
    """Which prompt each answers."""
    streams: Sequence[Streams]
    """What models said of the tokens: ``old_logp``, ``reference_logp``, ``value``, as far as it was asked for."""


class Algorithm:
    """Turns rewards into streams."""

    @property
    def least(self) -> int:
        """Samples of one prompt that there must be with a reward."""
        return 1

    def streams(self, scored: Scored) -> tuple[list[Streams], Mapping[str, float]]:
        """More streams of each sample's tokens, and numbers for the metrics of the round."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """What it has learned, as JSON."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on with what it had learned."""

    def take_over(self, before: Algorithm) -> None:
        """Go on with what another of its kind, of which this one is an amendment, had learned."""
        self.load(before.state())


@dataclass
class Relative(Algorithm):
    """Every sampled token has the advantage of its sample: its reward against a baseline.

    ``kl_in_reward`` times the divergence from the reference, summed over a sample's tokens, is taken from its reward.
    """

    baseline: Baseline = "group"
    scale: Scale = "group"
    kl_in_reward: float = 0.0

    @property
    def least(self) -> int:
        return 1 if self.baseline == "batch" else 2

    def streams(self, scored: Scored) -> tuple[list[Streams], Mapping[str, float]]:
        rewards = np.asarray(scored.rewards, np.float64)
        if self.kl_in_reward:
            rewards = rewards - self.kl_in_reward * np.array([drift(streams).sum() for streams in scored.streams])
        advantages = relative(rewards.tolist(), scored.groups, self.baseline, self.scale)
        sizes = [len(streams[OLD_LOGP.name]) for streams in scored.streams]
        return [{ADVANTAGE.name: np.full(n, a)} for n, a in zip(sizes, advantages.tolist(), strict=True)], {}


@dataclass
class Generalized(Algorithm):
    """Every sampled token has its own advantage over what a critic expected (PPO, Schulman et al., 2017).

    Each token is charged ``kl_coefficient`` times its divergence from the reference; the reward comes with the last.
    With a ``kl_target`` the coefficient is adapted after each round, so that the divergence of a sample comes to it
    (Ziegler et al., 2019).
    """

    gamma: float = 1.0
    lam: float = 0.95
    kl_coefficient: float = 0.0
    kl_target: float | None = None
    kl_horizon: float = 10_000.0
    """Samples over which the coefficient is adapted."""

    def __post_init__(self) -> None:
        self._first_coefficient = self.kl_coefficient

    def take_over(self, before: Algorithm) -> None:
        if isinstance(before, Generalized) and before._first_coefficient == self._first_coefficient:
            super().take_over(before)

    def streams(self, scored: Scored) -> tuple[list[Streams], Mapping[str, float]]:
        advantages, returns, drifts = [], [], []
        for reward, streams in zip(scored.rewards, scored.streams, strict=True):
            divergence = drift(streams) if REFERENCE_LOGP.name in streams else np.zeros(len(streams[VALUE.name]))
            tokens = -self.kl_coefficient * divergence
            tokens[-1] += reward
            advantage, expected = generalized(tokens, streams[VALUE.name].astype(np.float64), self.gamma, self.lam)
            advantages.append(advantage)
            returns.append(expected)
            drifts.append(divergence.sum())
        metrics = {"return": float(np.concatenate(returns).mean())} if returns else {}
        if self.kl_target is not None:
            metrics["kl_coefficient"] = self.kl_coefficient
            error = float(np.clip(np.mean(drifts) / self.kl_target - 1, -0.2, 0.2))
            self.kl_coefficient *= 1 + error * len(drifts) / self.kl_horizon
        white = whiten(advantages)
        return [
            {ADVANTAGE.name: advantage, RETURN.name: expected}
            for advantage, expected in zip(white, returns, strict=True)
        ], metrics

    def state(self) -> dict[str, Any]:
        return {"kl_coefficient": self.kl_coefficient}

    def load(self, state: Mapping[str, Any]) -> None:
        self.kl_coefficient = state["kl_coefficient"]


class NoAdvantages(Algorithm):
    """For an objective that reads none: it compares the tokens with those of another model."""

    least = 0

    def streams(self, scored: Scored) -> tuple[list[Streams], Mapping[str, float]]:
        return [{} for _ in scored.streams], {}


def drift(streams: Streams) -> np.ndarray:
    """log p_old - log p_reference of each token, float64: in the mean over samples the divergence of the two."""
    return streams[OLD_LOGP.name].astype(np.float64) - streams[REFERENCE_LOGP.name]
