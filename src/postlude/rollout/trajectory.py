"""Trajectories: what was asked and what was answered, as the very token ids that an engine saw and sampled.

A trajectory only grows at its end. It is never tokenised again, so what is trained is what was sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from postlude.data.document import WEIGHT, Document
from postlude.objectives.policy import BEHAVIOUR_LOGP
from postlude.rollout.engine import Completion, Ended
from postlude.rollout.ledger import Issue
from postlude.rollout.prompts import Prompt
from postlude.rollout.reward import Asked
from postlude.rollout.reward_pool import Unscored
from postlude.rollout.scoring import Score

_STATE = ("sample", "tokens", "sampled", "logp", "versions", "turns", "replies", "earned", "ended")


@dataclass
class Trajectory:
    """One sample of a prompt, and what was found out about it."""

    issue: Issue
    prompt: Prompt
    sample: int
    """Which of the prompt's samples it is."""
    tokens: list[int]
    sampled: list[bool]
    """Of each token, whether the engine sampled it; the others were given to it, and are not trained."""
    logp: list[float]
    """Of each token its log-probability, where it was sampled; else 0."""
    versions: list[int]
    """Of each token the version of the weights that sampled it; -1 where it was given."""
    turns: list[str] = field(default_factory=list)
    """What was sampled in each turn says."""
    replies: list[Asked] = field(default_factory=list)
    """What an environment said after each turn but the last."""
    earned: float = 0.0
    """The rewards that an environment gave."""
    ended: Ended = "cut"
    score: Score | Unscored | None = None
    recorded: Mapping[str, Any] = field(default_factory=dict)
    """What the rollouts keep of its tokens (:mod:`postlude.runs.tokens`)."""

    @classmethod
    def begin(cls, issue: Issue, prompt: Prompt, sample: int, tokens: Sequence[int]) -> Trajectory:
        """A prompt to which nothing has been answered."""
        count = len(tokens)
        return cls(issue, prompt, sample, list(tokens), [False] * count, [0.0] * count, [-1] * count)

    @property
    def complete(self) -> bool:
        """Whether nothing is to be answered any more."""
        return self.ended != "cut"

    def answer(self, completion: Completion, text: Callable[[Sequence[int]], str]) -> None:
        """Append what an engine sampled, which goes on with a turn that was cut. ``text`` says what tokens say."""
        count = len(completion.tokens)
        if self.ended == "cut" and self.turns:
            del self.turns[-1]
        self.tokens += completion.tokens
        self.sampled += [True] * count
        self.logp += completion.log_probabilities
        self.versions += completion.versions or [0] * count
        self.ended = completion.ended
        last_given = next((place for place in reversed(range(len(self.sampled))) if not self.sampled[place]), -1)
        self.turns.append(text(self.tokens[last_given + 1 :]))

    def give(self, tokens: Sequence[int], reply: Asked) -> None:
        """Append what somebody else said: a tool, an environment."""
        self.replies.append(reply)
        count = len(tokens)
        self.tokens += tokens
        self.sampled += [False] * count
        self.logp += [0.0] * count
        self.versions += [-1] * count

    @property
    def text(self) -> str:
        """What the last turn says."""
        return self.turns[-1] if self.turns else ""

    @property
    def sampled_tokens(self) -> int:
        return sum(self.sampled)

    @property
    def sampled_versions(self) -> list[int]:
        """Of each sampled token the version of the weights that sampled it."""
        return [version for version in self.versions if version >= 0]

    @property
    def oldest_version(self) -> int:
        """The version of the weights that its first token was sampled with."""
        return min(self.sampled_versions, default=-1)

    @property
    def reward(self) -> float:
        """ValueError where it has none."""
        if not isinstance(self.score, Score):
            raise ValueError(f"The sample {self.sample} of '{self.prompt.example_id}' has no reward.")
        return self.score.total

    def state(self) -> dict[str, Any]:
        """What was answered so far, as JSON; issue and prompt are found by number and id."""
        return {
            "issue": self.issue.number,
            "prompt": self.prompt.example_id,
            **{name: getattr(self, name) for name in _STATE},
        }

    @classmethod
    def restored(cls, issue: Issue, prompt: Prompt, state: Mapping[str, Any]) -> Trajectory:
        """From its state."""
        return cls(issue, prompt, **{name: state[name] for name in _STATE})

    def document(self, group: int) -> Document:
        """As a document, its sampled tokens trained."""
        weight = np.array(self.sampled, np.float32)
        streams = {WEIGHT.name: weight, BEHAVIOUR_LOGP.name: np.array(self.logp, np.float32)}
        tokens = np.array(self.tokens, np.int64)
        return Document(self.prompt.example_id, self.prompt.source, tokens, streams, group=group)

    def line(self) -> dict[str, Any]:
        """As the rollouts of a stage tell it."""
        line: dict[str, Any] = {
            "prompt_id": self.prompt.example_id,
            "issue": self.issue.number,
            "epoch": self.issue.epoch,
            "sample": self.sample,
            "prompt": self.prompt.asked,
            "completion": self.text,
            "ended": self.ended,
            "tokens": self.sampled_tokens,
            "versions": [self.oldest_version, max(self.versions)],
        }
        if self.replies:
            line["turns"] = self.turns
            line["replies"] = self.replies
        if isinstance(self.score, Score):
            line |= {"reward": self.score.total, "rewards": dict(self.score.parts)}
        elif self.score is not None:
            line["unscored"] = self.score.detail
        return {**line, **self.recorded}
