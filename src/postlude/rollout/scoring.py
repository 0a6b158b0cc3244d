"""The reward of completions: every part that the manifest names, weighted and added."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from postlude.errors import DataError
from postlude.rollout.prompts import Prompt
from postlude.rollout.reward import Reward, RewardFunction, call, part_names
from postlude.rollout.reward_model import Judge
from postlude.rollout.reward_pool import RewardPool, Unscored


@dataclass(frozen=True)
class Score:
    """The reward of one completion."""

    total: float
    parts: Mapping[str, float]
    """Before they are weighted."""


class Scorer:
    """Scores completions. ``judge`` gives the reward model that a part names, once it is needed.

    ManifestError if a function is not there.
    """

    def __init__(self, rewards: Sequence[Reward], judge: Callable[[Reward], Judge]) -> None:
        self._parts = list(zip(part_names(rewards), rewards, strict=True))
        self._judge = judge
        self._judges: dict[str, Judge] = {}
        for _, reward in self._parts:
            if reward.function is not None:
                reward.function.check()

    def __len__(self) -> int:
        return len(self._parts)

    def score(self, completions: Sequence[tuple[Prompt, str]]) -> list[Score]:
        """The reward of each completion of a prompt.

        DataError, naming the record, if a function raises or returns no number, or a model gives none.
        """
        columns: dict[str, list[float]] = {}
        for name, reward in self._parts:
            if reward.function is not None:
                columns[name] = self.called(reward.function, name, completions)
            else:
                columns[name] = self._judged(name, reward, completions)
        return [self._sum({name: values[row] for name, values in columns.items()}) for row in range(len(completions))]

    def score_each(self, completions: Sequence[tuple[Prompt, str]], pool: RewardPool) -> list[Score | Unscored]:
        """The same for whoever can do without some: functions run in the pool, and where one fails or takes too long
        it is told of that completion alone."""
        columns: dict[str, Sequence[float | Unscored]] = {}
        for name, reward in self._parts:
            if reward.function is not None:
                columns[name] = pool.score(reward.function, name, completions)
            else:
                columns[name] = self._judged(name, reward, completions)
        rows = [{name: values[row] for name, values in columns.items()} for row in range(len(completions))]
        return [_first_unscored(row) or self._sum(row) for row in rows]  # type: ignore[arg-type]

    @staticmethod
    def called(function: RewardFunction, name: str, completions: Sequence[tuple[Prompt, str]]) -> list[float]:
        """A function's rewards, computed here."""
        return [
            call(function, name, prompt.example_id, prompt.asked, text, prompt.rewarded_record)
            for prompt, text in completions
        ]

    def _sum(self, parts: Mapping[str, float]) -> Score:
        return Score(math.fsum(reward.weight * parts[name] for name, reward in self._parts), parts)

    def _judged(self, name: str, reward: Reward, completions: Sequence[tuple[Prompt, str]]) -> list[float]:
        if name not in self._judges:
            self._judges[name] = self._judge(reward)
        answers = [(prompt.example_id, prompt.answered(text)) for prompt, text in completions]
        scores = self._judges[name].score(answers)
        for (prompt, _), score in zip(completions, scores, strict=True):
            if not math.isfinite(score):
                raise DataError(
                    f"The reward model '{name}' gave {score} for '{prompt.example_id}'. Look at its weights."
                )
        return scores


def _first_unscored(parts: Mapping[str, float | Unscored]) -> Unscored | None:
    return next((value for value in parts.values() if isinstance(value, Unscored)), None)


def pass_at_k(samples: int, successes: int, k: int) -> float:
    """The probability that of ``k`` samples, drawn from so many with so many successes, one at least succeeds.

    The unbiased estimate of Chen et al. (2021): ``1 - C(samples - successes, k) / C(samples, k)``.
    """
    return 1.0 - math.comb(samples - successes, k) / math.comb(samples, k)
