"""Environments: what answers a policy between its turns. One of one's own is two small classes.

class Guess(Environment):
    most: int = 9

    async def reset(self, prompt, record):
        return Game(record["secret"])

class Game:
    def __init__(self, secret):
        self.secret = secret

    async def step(self, said):
        right = said.strip() == str(self.secret)
        return Reply(done=right, reward=float(right), messages=[{"role": "user", "content": "Guess again."}])
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from postlude.data.example import Record
from postlude.errors import DataError, UserError
from postlude.manifest.component import Component
from postlude.rollout.reward import Asked, finite


@dataclass(frozen=True)
class Reply:
    """What an environment answers to a turn of the policy."""

    messages: Asked = ()
    """What is said to the policy; a text where the prompt is one. Nothing is said where it is done."""
    done: bool = False
    """Whether the episode is over."""
    reward: float = 0.0
    """For this turn; those of an episode are added."""


class Episode(Protocol):
    """One conversation with an environment."""

    async def step(self, said: str) -> Reply:
        """The answer to what the policy said in its turn."""


class Environment(Component):
    """Answers a policy between its turns. The component of the kind ``environments``.

    An episode runs in whatever process has time; in another one than before it is played again from its beginning, with
    the same turns of the policy. So what it answers must follow from the prompt, the record and the turns.
    """

    def check(self) -> None:
        """:class:`~postlude.errors.ManifestError` if it cannot be used: what it names is not there."""

    def tools(self) -> list[dict[str, Any]] | None:
        """Descriptions of tools for the chat template, if it has some: as JSON schemas of functions."""
        return None

    async def reset(self, prompt: Asked, record: Record) -> Episode:
        """Begin an episode. ``prompt`` is what the policy was asked; ``record`` is the whole record, where
        ``reference`` is what the data answer."""
        raise NotImplementedError


_episodes: dict[tuple[str, int], tuple[Sequence[str], Episode]] = {}
"""Of this process: the turns that an episode has had, and the episode."""
_MOST_EPISODES = 4096


def play(
    environment: Environment,
    name: str,
    example_id: str,
    key: tuple[str, int],
    prompt: Asked,
    record: Record,
    turns: Sequence[str],
) -> Reply:
    """The environment's answer to the last of the policy's turns, in the episode that ``key`` stands for.

    DataError, naming the record, if it raises or answers nothing that can be used.
    """

    async def answer() -> Reply:
        played, episode = _episodes.pop(key, ((), None))
        if episode is None or played != turns[:-1]:
            episode = await environment.reset(prompt, record)
            for turn in turns[:-1]:
                await episode.step(turn)
        reply: Any = await episode.step(turns[-1])
        if isinstance(reply, Reply) and not reply.done:
            if len(_episodes) >= _MOST_EPISODES:
                _episodes.clear()
            _episodes[key] = turns, episode
        return reply

    try:
        reply = asyncio.run(answer())
    except UserError:
        raise
    except Exception as error:  # somebody else's code: whatever it raises is told with the record that it met
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise DataError(
            f"The environment '{name}' failed at the record '{example_id}', in turn {len(turns)}: "
            f"{type(error).__name__}: {error} ({frame.filename}:{frame.lineno})."
        ) from error
    if not isinstance(reply, Reply) or (not reply.done and not reply.messages):
        raise DataError(
            f"The environment '{name}' answered {reply!r} at the record '{example_id}'. It must return a Reply with "
            "messages, or one that is done."
        )
    reward = finite(reply.reward)
    if reward is None:
        raise DataError(
            f"The environment '{name}' gave the record '{example_id}' a reward of the type "
            f"{type(reply.reward).__name__} in turn {len(turns)} that is no finite number."
        )
    return replace(reply, reward=reward)
