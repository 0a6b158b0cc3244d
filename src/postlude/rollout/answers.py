"""Prompts become answered and scored trajectories: every rank its share, and all of them on every rank in the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass, field

from postlude.errors import DataError
from postlude.rollout.engine import Engine, Enough, Request, Sampling
from postlude.rollout.environment import Environment, play
from postlude.rollout.ledger import Issue
from postlude.rollout.prompts import NotAsked, Prompt, PromptEncoders
from postlude.rollout.reward_pool import Task, Unscored
from postlude.rollout.scoring import Score, Scorer
from postlude.rollout.trajectory import Trajectory
from postlude.telemetry.pulse import beat
from postlude.training.meters import Phases
from postlude.training.workers import Workers

Group = list[Trajectory]
"""The samples of one prompt."""


@dataclass
class Answering:
    """Groups that are being answered."""

    groups: Sequence[Group]
    own: list[Group]
    """This rank's share of them."""
    share: float | None
    """Of the records, that has to be complete before it is over; None for all."""
    phases: Phases
    """Where the time goes that is spent on them."""
    done: Future[None] = field(default_factory=Future)


@dataclass(frozen=True)
class Answerer:
    """Answers prompts and scores what was answered: the one way from a prompt to a scored answer, whether the model is
    trained on it or not. All of ``workers`` call it with the same arguments."""

    engine: Engine
    encoders: PromptEncoders
    sampling: Callable[[str], Sampling]
    """How the prompts of a data set are answered."""
    scorer: Scorer
    workers: Workers
    phases: Phases
    tell: Callable[..., None]
    """Takes an event, its kind and fields."""
    room: int | None
    """Tokens that a prompt and its answers may have together; None where nothing but the engine bounds them."""
    longest_prompt: int | None = None
    """In tokens."""
    is_repeated: bool = True
    """Whether the same prompt is asked again in another epoch, and is another one then."""
    environment: Environment | None = None
    """What answers between turns."""
    most_turns: int = 1
    few: int | None = None
    """Data ranks that have engines to ask, the first ones; None where all have."""
    background: Executor | None = None
    """Where answers are made while this thread goes on; None makes them in this thread."""

    @property
    def askers(self) -> int:
        """How many data ranks there are that ask."""
        return min(self.workers.data_world, self.few or self.workers.data_world)

    def begin(self, issue: Issue, prompt: Prompt, samples: int) -> Group | str:
        """Trajectories of a prompt to which nothing is answered yet; why there are none, where it cannot be asked."""
        tokens = self.encoders.tokens(prompt, self.longest_prompt)
        if isinstance(tokens, NotAsked):
            return tokens.reason
        return [Trajectory.begin(issue, prompt, sample, tokens) for sample in range(samples)]

    def answer(self, groups: Sequence[Group], needed: int | None = None) -> list[Group]:
        """The groups with answers and, where there are rewards, scores. If only so many records are ``needed``, others
        may come back cut, without scores, and go on another time; but none that was cut before."""
        return self.finish(self.start(groups, needed))

    def start(self, groups: Sequence[Group], needed: int | None = None) -> Answering:
        """Begin to answer this rank's share of groups; in the background, where there is one."""
        asks = self.workers.data_rank < self.askers and (self.workers.speaks or not self.engine.is_external)
        own = list(groups[self.workers.data_rank :: self.askers]) if asks else []
        records = len({group[0].issue for group in groups})
        share = None if needed is None else needed / max(records, 1)
        answering = Answering(groups, own, share, Phases(self.phases.synchronize))
        if self.background is not None:
            answering.done = self.background.submit(self._work, answering)
        else:
            with self.phases.measure("wait"):
                self._work(answering)
            answering.done.set_result(None)
        return answering

    def finish(self, answering: Answering) -> list[Group]:
        """What was begun, once it is there, with the shares of all ranks."""
        with self.phases.measure("wait"):
            while not wait([answering.done], timeout=1.0).done:
                beat("wait")  # deadlines are kept where it is worked on
            answering.done.result()
        self.phases.add(answering.phases.take())
        groups, own = answering.groups, answering.own
        with self.phases.measure("gather"):
            share = own if self.workers.speaks else None
            parts = self.workers.gather((self.workers.data_rank, share, self.engine.deaths()))
        for death in (death for *_, deaths in parts for death in deaths):
            self.tell("engine_died", engine=death.engine, reason=death.reason)
        shares: Mapping[int, Iterator[Group]] = {rank: iter(part) for rank, part, _ in parts if part is not None}
        return [next(shares[place % self.askers]) for place in range(len(groups))]

    def _work(self, answering: Answering) -> None:
        trajectories = [trajectory for group in answering.own for trajectory in group]
        with answering.phases.measure("generate"):
            self._generate(trajectories, answering.share)
        with answering.phases.measure("score"):
            self._score([sample for group in answering.own if complete(group) for sample in group])

    def _generate(self, trajectories: Sequence[Trajectory], share: float | None) -> None:
        """Turn by turn, until nobody has anything to say any more, or enough have said all."""
        begun = {sample.issue.number for sample in trajectories if sample.sampled_tokens}
        live = [sample for sample in trajectories if not sample.complete]
        while live:
            self._sample(live, begun, share)
            live = [] if self.environment is None else self._reply(self.environment, live)

    def _reply(self, environment: Environment, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        """Give the environment's replies to those whose turn has ended. Those that go on."""
        name = environment.component_name
        stopped = [sample for sample in trajectories if sample.ended == "stop"]
        tasks = [
            Task(
                sample.prompt.example_id,
                (
                    (self._id(sample), sample.sample),
                    sample.prompt.asked,
                    dict(sample.prompt.rewarded_record),
                    tuple(sample.turns),
                ),
            )
            for sample in stopped
        ]
        goes_on = []
        replies = self.scorer.pool.run(play, environment, name, tasks, f"the environment '{name}'")
        for sample, reply in zip(stopped, replies, strict=True):
            if isinstance(reply, Unscored):
                sample.score = reply
                continue
            sample.earned += reply.reward
            if reply.done or len(sample.turns) == self.most_turns:
                continue
            encoder = self.encoders[sample.prompt.source]
            try:
                tokens = encoder.reply(
                    sample.prompt, sample.turns, [*sample.replies, reply.messages], sample.tokens[-1]
                )
            except DataError as error:
                reason = "what the environment replied cannot be rendered"
                sample.score = Unscored(reason, f"{reason}, at the record '{sample.prompt.example_id}': {error}")
                continue
            if len(tokens) < self._room_left(sample) and sample.sampled_tokens < self._most(sample):
                sample.give(tokens, reply.messages)
                goes_on.append(sample)
            else:
                sample.ended = "length"
        return goes_on

    def _most(self, sample: Trajectory) -> int:
        return self.sampling(sample.prompt.source).max_tokens

    def _room_left(self, sample: Trajectory) -> float:
        return math.inf if self.room is None else self.room - len(sample.tokens)

    def _id(self, sample: Trajectory) -> str:
        """What an engine knows a trajectory's prompt by."""
        return f"{sample.prompt.example_id}@{sample.issue.number}" if self.is_repeated else sample.prompt.example_id

    def _sample(self, trajectories: Sequence[Trajectory], begun: Container[int], share: float | None) -> None:
        """One turn of each, or of enough of them."""
        by_source: dict[str, list[Trajectory]] = {}
        for trajectory in trajectories:
            by_source.setdefault(trajectory.prompt.source, []).append(trajectory)
        for source, samples in by_source.items():
            enough = None if share is None else enough_of(samples, begun, share)
            requests = [
                Request(
                    self._id(sample),
                    tuple(sample.tokens),
                    sample.sample,
                    sample.sampled_tokens,
                    int(min(self._most(sample) - sample.sampled_tokens, self._room_left(sample))),
                )
                for sample in samples
            ]
            completions = self.engine.generate(requests, self.sampling(source), enough)
            for sample, completion in zip(samples, completions, strict=True):
                sample.answer(completion, self.encoders[source].text)

    def _score(self, trajectories: Sequence[Trajectory]) -> None:
        if not len(self.scorer) and self.environment is None:
            return
        left = [sample for sample in trajectories if sample.score is None]  # the others failed on the way
        scores = self.scorer.score([(sample.prompt, sample.text) for sample in left])
        for sample, score in zip(left, scores, strict=True):
            if self.environment is not None and isinstance(score, Score):
                parts = {**score.parts, self.environment.component_name: sample.earned}
                score = Score(score.total + sample.earned, parts)
            sample.score = score


def complete(group: Group) -> bool:
    """Whether every sample is answered."""
    return all(sample.complete for sample in group)


def enough_of(trajectories: Sequence[Trajectory], begun: Container[int], share: float) -> Enough:
    """Such a share of the records, and all that something was answered to before."""
    places: dict[int, list[int]] = {}
    for place, sample in enumerate(trajectories):
        places.setdefault(sample.issue.number, []).append(place)
    must = frozenset(number for number, issue in enumerate(places) if issue in begun)
    return Enough(tuple(map(tuple, places.values())), math.ceil(share * len(places)), must)
