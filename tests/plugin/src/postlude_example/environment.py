"""An environment of a user's own: it asks for another answer, a few times, and rewards those that say something new."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from postlude.rollout.environment import Environment, Episode, Reply
from postlude.rollout.reward import Asked


class AskAgain(Environment):
    """Asks ``times`` more times; a turn that repeats none before it earns 1."""

    times: int = 2

    async def reset(self, prompt: Asked, record: Mapping[str, Any]) -> Episode:
        return _Questions(self.times, isinstance(prompt, str))


class _Questions:
    def __init__(self, times: int, is_text: bool) -> None:
        self._times, self._is_text = times, is_text
        self._turns: list[str] = []

    async def step(self, said: str) -> Reply:
        is_new = said not in self._turns
        self._turns.append(said)
        words = f"Number {len(self._turns)}. Again?"
        return Reply(
            words if self._is_text else [{"role": "user", "content": words}],
            done=len(self._turns) > self._times,
            reward=float(is_new),
        )
