"""The reward of completions: every part that the manifest names, weighted and added."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from postlude.manifest.errors import DataError, UserError
from postlude.rollout.judge import Judge
from postlude.rollout.prompts import Prompt
from postlude.rollout.reward import REFERENCE, Reward, RewardFunction, part_names


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
                columns[name] = [_called(reward.function, name, *completion) for completion in completions]
            else:
                columns[name] = self._judged(name, reward, completions)
        return [
            Score(
                math.fsum(reward.weight * columns[name][row] for name, reward in self._parts),
                {name: columns[name][row] for name, _ in self._parts},
            )
            for row in range(len(completions))
        ]

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


def _called(function: RewardFunction, name: str, prompt: Prompt, completion: str) -> float:
    record = {**prompt.record}
    record.setdefault(REFERENCE, prompt.reference)
    try:
        value: Any = function.score(prompt.asked, completion, record)
    except UserError:
        raise
    except Exception as error:  # somebody else's code: whatever it raises is told with the record that it met
        frame = traceback.extract_tb(error.__traceback__)[-1]
        what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise DataError(
            f"The reward '{name}' failed at the record '{prompt.example_id}': {what} "
            f"({frame.filename}:{frame.lineno}). Mend the function or the record, or leave such records "
            "out with a filter."
        ) from error
    try:
        number = math.nan if isinstance(value, str | bytes) or value is None else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}..."
        raise DataError(
            f"The reward '{name}' returned {shown} for the record '{prompt.example_id}', which is no finite number. "
            "Return a number from it for every record."
        )
    return number
