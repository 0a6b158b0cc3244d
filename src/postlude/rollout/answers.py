"""Prompts become answered and scored trajectories: every rank its share, and all of them on every rank in the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from postlude.rollout.engine import Engine, Request, Sampling
from postlude.rollout.ledger import Issue
from postlude.rollout.pool import RewardPool
from postlude.rollout.prompts import Prompt, PromptEncoder
from postlude.rollout.scoring import Scorer
from postlude.rollout.trajectory import Trajectory
from postlude.training.timing import Phases
from postlude.training.workers import Workers

Group = list[Trajectory]
"""The samples of one prompt."""

EMPTY = "the prompt is empty"


@dataclass(frozen=True)
class Answerer:
    """Answers prompts and scores what was answered. Every rank calls it with the same arguments."""

    engine: Engine
    encoder: Callable[[str], PromptEncoder]
    """How the prompts of a data set are put to the policy."""
    sampling: Callable[[str], Sampling]
    """How those of a data set are answered."""
    scorer: Scorer
    pool: RewardPool
    workers: Workers
    phases: Phases
    room: int
    """Tokens that a prompt and its answer may have together."""

    def begin(self, issue: Issue, prompt: Prompt, samples: int) -> Group | str:
        """Trajectories of a prompt to which nothing is answered yet; why there are none, where it cannot be asked."""
        tokens = self.encoder(prompt.source).tokens(prompt)
        if not tokens:
            return EMPTY
        longest = self.room - self.sampling(prompt.source).max_tokens
        if len(tokens) > longest:
            return f"the prompt is longer than {longest} tokens"
        return [Trajectory.begin(issue, prompt, sample, tokens) for sample in range(samples)]

    def answer(self, groups: Sequence[Group]) -> list[Group]:
        """The groups with answers and, where there are rewards, scores."""
        own = list(groups[self.workers.data_rank :: self.workers.data_world])
        with self.phases.measure("generate"):
            self._generate([trajectory for group in own for trajectory in group])
        with self.phases.measure("score"):
            self._score([trajectory for group in own for trajectory in group])
        with self.phases.measure("gather"):
            parts = self.workers.gather((self.workers.data_rank, own if self.workers.speaks else None))
        by_rank: Mapping[int, list[Group]] = {rank: part for rank, part in parts if part is not None}
        places = {rank: iter(part) for rank, part in by_rank.items()}
        return [next(places[place % self.workers.data_world]) for place in range(len(groups))]

    def _generate(self, trajectories: Sequence[Trajectory]) -> None:
        by_source: dict[str, list[Trajectory]] = {}
        for trajectory in trajectories:
            by_source.setdefault(trajectory.prompt.source, []).append(trajectory)
        for source, some in by_source.items():
            requests = [
                Request(f"{one.prompt.example_id}@{one.issue.number}", tuple(one.tokens), one.sample) for one in some
            ]
            encoder = self.encoder(source)
            for one, made in zip(some, self.engine.generate(requests, self.sampling(source)), strict=True):
                one.answer(made)
                one.text = encoder.text(made.tokens)

    def _score(self, trajectories: Sequence[Trajectory]) -> None:
        if not len(self.scorer):
            return
        scores = self.scorer.score_each([(one.prompt, one.text) for one in trajectories], self.pool)
        for trajectory, score in zip(trajectories, scores, strict=True):
            trajectory.score = score
