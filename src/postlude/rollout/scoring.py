"""The reward of completions: every part that the manifest names, weighted and added."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from postlude.errors import DataError
from postlude.rollout.prompts import Prompt
from postlude.rollout.reward import Reward, part_names
from postlude.rollout.reward_model import RewardModel
from postlude.rollout.reward_pool import RewardPool, Unscored


@dataclass(frozen=True)
class Score:
    """The reward of one completion."""

    total: float
    parts: Mapping[str, float]
    """Before they are weighted."""


class Scorer:
    """Scores completions. ``model_of`` gives the reward model that a part names, once it is needed; functions run in
    ``pool``.

    ManifestError if a function is not there.
    """

    def __init__(self, rewards: Sequence[Reward], model_of: Callable[[Reward], RewardModel], pool: RewardPool) -> None:
        self._parts = list(zip(part_names(rewards), rewards, strict=True))
        self._model_of, self.pool = model_of, pool
        self._models: dict[str, RewardModel] = {}
        for _, reward in self._parts:
            if reward.function is not None:
                reward.function.check()

    def __len__(self) -> int:
        return len(self._parts)

    def score(self, completions: Sequence[tuple[Prompt, str]]) -> list[Score | Unscored]:
        """The reward of each completion of a prompt, or why a function gave it none.

        DataError, naming the record, if a model gives no finite number.
        """
        columns: dict[str, Sequence[float | Unscored]] = {}
        for name, reward in self._parts:
            if reward.function is not None:
                columns[name] = self.pool.score(reward.function, name, completions)
            else:
                columns[name] = self._modelled(name, reward, completions)
        rows = [{name: values[row] for name, values in columns.items()} for row in range(len(completions))]
        unscored = [next((value for value in row.values() if isinstance(value, Unscored)), None) for row in rows]
        return [why or self._sum(row) for why, row in zip(unscored, rows, strict=True)]  # type: ignore[arg-type]

    def _sum(self, parts: Mapping[str, float]) -> Score:
        return Score(math.fsum(reward.weight * parts[name] for name, reward in self._parts), parts)

    def _modelled(self, name: str, reward: Reward, completions: Sequence[tuple[Prompt, str]]) -> list[float]:
        if name not in self._models:
            self._models[name] = self._model_of(reward)
        answers = [(prompt.example_id, prompt.answered(text)) for prompt, text in completions]
        scores = self._models[name].score(answers)
        for (prompt, _), score in zip(completions, scores, strict=True):
            if not math.isfinite(score):
                raise DataError(
                    f"The reward model '{name}' gave {score} for '{prompt.example_id}'. Look at its weights."
                )
        return scores

    def close(self) -> None:
        """Leave no process at work."""
        self.pool.close()


def pass_at_k(samples: int, successes: int, k: int) -> float:
    """The probability that of ``k`` samples, drawn from so many with so many successes, one at least succeeds.

    The unbiased estimate of Chen et al. (2021): ``1 - C(samples - successes, k) / C(samples, k)``.
    """
    return 1.0 - math.comb(samples - successes, k) / math.comb(samples, k)


def passes(rewards: Sequence[Sequence[float]], success: float, samples: int) -> dict[int, list[float]]:
    """pass@k of each prompt, given the rewards of its answers, for the powers of two up to ``samples``; an answer
    passes whose reward is at least ``success``. Prompts with fewer than k answers do not count for it."""
    powers = [2**exponent for exponent in range(samples.bit_length())]
    return {
        k: [pass_at_k(len(row), sum(reward >= success for reward in row), k) for row in rewards if len(row) >= k]
        for k in powers
    }
