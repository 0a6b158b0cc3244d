"""What an engine is: token ids go in; token ids, their log-probabilities and why each completion ended come out.

Nothing is ever tokenised again: whoever trains on a completion trains on the very ids that were sampled.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from postlude.errors import UserError

Ended = Literal["stop", "length", "cut"]
"""Why a completion ended: with a stop token, because it had no room for more, or because enough others had ended."""


@dataclass(frozen=True)
class Request:
    """One completion to be made."""

    prompt_id: str
    """What the prompt is known by: the randomness of its completions follows from it."""
    tokens: tuple[int, ...]
    """The prompt's token ids."""
    sample: int = 0
    """Which of the prompt's completions it is."""
    position: int = 0
    """How many of these tokens it sampled itself in earlier turns: its randomness goes on from there."""
    limit: int | None = None
    """The most tokens to sample now; by default what ``max_tokens`` says."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen."""

    max_tokens: int
    stop_ids: frozenset[int]
    """Each ends a completion, as its last token."""
    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """Only the likeliest tokens that together have this probability are drawn from."""
    seed: int = 0


@dataclass(frozen=True)
class Enough:
    """When a call may return though not all of its requests have ended."""

    bundles: tuple[tuple[int, ...], ...]
    """The places of requests that are of use only together."""
    needed: int
    """Bundles that have to end."""
    must: frozenset[int] = frozenset()
    """Those that have to be among them, by their place."""

    def reached(self, ended: Container[int]) -> bool:
        """Whether so many have ended, given the places of the requests that have."""
        whole = {number for number, places in enumerate(self.bundles) if all(place in ended for place in places)}
        return len(whole) >= self.needed and self.must <= whole


@dataclass(frozen=True)
class Completion:
    """What became of a request."""

    request: Request
    tokens: tuple[int, ...]
    """The sampled token ids, the stop token included."""
    log_probabilities: tuple[float, ...]
    """Of each sampled token, at the temperature it was sampled with (at 1 for temperature 0), before ``top_p``."""
    ended: Ended
    versions: tuple[int, ...] = ()
    """Of each sampled token, of the weights that sampled it; none where the engine does not know."""


def with_version(completions: Sequence[Completion], version: int) -> list[Completion]:
    """The same, all of whose tokens were sampled by the weights of one version."""
    return [replace(completion, versions=(version,) * len(completion.tokens)) for completion in completions]


@dataclass(frozen=True)
class Death:
    """An engine that died, and in whose place another is."""

    engine: str
    reason: str


class EngineLost(UserError):
    """An engine died or hung, and so did those that took its place."""


class Engine(Protocol):
    """Makes completions. A completion follows from its request and the sampling alone: what else is asked for in the
    same call changes it by no more than rounding does."""

    @property
    def context(self) -> int | None:
        """How many tokens a prompt and its completion may have together; None if nothing bounds it."""

    @property
    def is_external(self) -> bool:
        """Whether it works in a process of its own, so that it can answer while this one trains."""

    def update(self, version: int) -> None:
        """Take over the weights of the policy as they now are, after ``version`` steps. What is being answered goes on
        with them."""

    def deaths(self) -> Sequence[Death]:
        """The engines that have died since this was last asked."""

    def close(self) -> None:
        """Leave no process and no file."""

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, enough: Enough | None = None
    ) -> list[Completion]:
        """A completion for each request, in order. Once ``enough`` have ended the others are cut where they are.

        ValueError for a prompt without tokens, or one that leaves no room in the context.
        """
