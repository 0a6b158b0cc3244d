"""The loop of online reinforcement learning: a loader whose steps are made of what the policy itself answers.

One turn of the loop, :meth:`Rounds.turn`, is a round: prompts are issued, answered, scored and assessed, and become a
few optimiser steps; the trainer takes them as it takes any others. Every rank runs the loop with the same ledger, does
its share of the work and knows the outcome of all of it.

Notable:

- What a round contains follows from the ledger and the weights alone, so a resume repeats it to the last bit.
- A checkpoint between two steps of a round holds the documents of the steps that are left.
- What becomes of each prompt is told with the step that trains it, or before which it was dropped.
"""

from __future__ import annotations

import base64
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from postlude.data.document import Block, Document, Unit
from postlude.data.loader import StepBlocks
from postlude.data.packing import best_fit
from postlude.errors import DataError
from postlude.objectives.policy import ADVANTAGE
from postlude.rollout.answers import Answerer, Answering, Group, complete
from postlude.rollout.assessment import Assessment, Journal
from postlude.rollout.ledger import Issue, Ledger
from postlude.rollout.prompts import Prompt
from postlude.rollout.reward_pool import Unscored
from postlude.rollout.trajectory import PlannedStep, Trajectory, packed_documents, unpacked_documents

ALIKE = "all samples have the same reward"
ENDED = "the stage has made its steps"
UNSCORED = "fewer samples than needed have a reward"
MOST_TRIES = 8
"""How often prompts are issued anew in a round, where some of them are of no use."""


@dataclass(frozen=True)
class Plan:
    """How rounds are made."""

    prompts: int
    """Of a round."""
    group: int
    """Samples of each prompt."""
    updates: int
    """Optimiser steps of one pass over a round, at least."""
    passes: int
    """Over a round."""
    block: int
    tokens: int
    """Of an optimiser step, about at most: a round that has more is divided into more steps."""
    steps: int | None
    """Optimiser steps of the stage; None if the ledger's epochs end it."""
    oversample: float = 1.0
    """So many times the prompts of a round are answered at a time; what is not complete when the round is goes on with
    the next."""
    ahead: int = 0
    """Rounds that are being answered while one is trained."""
    resample: bool = False
    """Whether prompts whose samples are all rewarded alike are dropped, and others issued in their place."""


class Rounds:
    """An iterator over steps (:class:`postlude.data.loader.StepBlocks`), as the trainer takes it.

    ``prompts`` reads the prompts of issued records, or why there are none. Iterating raises DataError if nothing that
    was answered can be trained on.
    """

    def __init__(
        self,
        plan: Plan,
        ledger: Ledger,
        prompts: Callable[[Sequence[Issue]], list[list[Prompt | str]]],
        answerer: Answerer,
        assessment: Assessment,
        journal: Journal,
    ) -> None:
        self.plan, self.ledger, self.assessment, self.algorithm = plan, ledger, assessment, assessment.algorithm
        self.answerer, self.workers, self.phases = answerer, answerer.workers, answerer.phases
        self._prompts, self._journal, self.engine = prompts, journal, answerer.engine
        self._step = 0
        self._ahead: deque[Answering] = deque()
        """The rounds that are being answered."""
        self._rest: list[Group] = []
        """What was cut when a round was complete, to go on with the next."""
        self._collected_at = time.perf_counter()
        self._planned: deque[PlannedStep] = deque()
        self._documents: list[Document] = []
        """Those of the round in progress."""
        self._lines: list[Mapping[str, Any]] = []
        """What is to be told with the next step."""
        self._told_last: list[Mapping[str, Any]] = []
        """What was told after the last step: a resume from there has cut it away."""

    @property
    def step(self) -> int:
        """Steps that were handed out."""
        return self._step

    def __iter__(self) -> Iterator[StepBlocks]:
        return self

    def __next__(self) -> StepBlocks:
        begin = self.ledger.settled
        while not self._planned and self._step != self.plan.steps and self._has_more:
            self._check_fruitful(begin)
            self.turn()
        if self._planned and self._step != self.plan.steps:
            return self._take()
        self._drop_the_rest()
        self._told_last = list(self._lines)
        self._tell()
        raise StopIteration

    @property
    def _has_more(self) -> bool:
        """Whether there is something left to be answered or collected."""
        return bool(self._ahead or self._rest) or not self.ledger.exhausted

    def _check_fruitful(self, begin: int) -> None:
        """DataError where as many prompts as there are, beyond the ``begin`` settled before, have given nothing to
        train on."""
        if self.ledger.settled - begin > sum(self.ledger.rows.values()):
            why = "; ".join(f"{count} because {reason}" for reason, count in self.ledger.dropped.most_common())
            raise DataError(
                f"A whole pass over the prompts has given nothing to train on. Dropped so far were {why}. Look at the "
                "prompts, at batch.block and rollout.max_tokens, and at the reward."
            )

    def turn(self) -> None:
        """One round: the loop itself. What is ``ahead`` is answered while this round is assessed and trained on."""
        if not self._ahead:
            self._begin(1)
        answered = self._completed(self.answerer.finish(self._ahead.popleft()))
        busy = self._busy()
        self._begin(min(self.plan.ahead, self._rounds_left() - 1))
        groups = self._collect(answered)
        with self.phases.measure("assess"):
            documents, metrics = self.assessment.of(groups, self._step)
        self._divide(groups, documents, {**metrics, **busy})

    # --- a round --------------------------------------------------------------------------------------------

    def _begin(self, rounds: int) -> None:
        """Give the engine the weights as they are, and see to it that so many rounds are being answered."""
        if len(self._ahead) >= rounds or (self.ledger.exhausted and not self._rest):
            return
        with self.phases.measure("sync"):
            self.engine.update(self._step)
        while len(self._ahead) < rounds and (self._rest or not self.ledger.exhausted):
            going_on, self._rest = self._rest, []
            wanted = math.ceil(self.plan.prompts * self.plan.oversample) - len({one[0].issue for one in going_on})
            begun = self._asked(max(wanted, 0))
            cuts = self.plan.oversample > 1 and not self.ledger.exhausted
            self._ahead.append(self.answerer.start(going_on + begun, self.plan.prompts if cuts else None))

    def _completed(self, answered: Sequence[Group]) -> list[Group]:
        """The groups of records that are answered wholly; the others are kept for the next round."""
        cut = {group[0].issue for group in answered if not complete(group)}
        self._rest += [group for group in answered if group[0].issue in cut]
        return [group for group in answered if group[0].issue not in cut]

    def _rounds_left(self) -> int:
        """How many rounds the steps that are left will take, this one included; far too many where no number of steps
        ends the stage."""
        if self.plan.steps is None:
            return sys.maxsize
        return -(-(self.plan.steps - self._step) // (self.plan.updates * self.plan.passes))

    def _busy(self) -> dict[str, float]:
        """The shares of the time since the round before in which the engine and the trainer were at work."""
        now, before = time.perf_counter(), self._collected_at
        self._collected_at, spent = now, self.phases.seconds
        return {
            "busy_engine": min(spent.get("generate", 0.0) / (now - before), 1.0),
            "busy_trainer": max(1.0 - spent.get("wait", 0.0) / (now - before), 0.0),
        }

    def _collect(self, answered: list[Group]) -> list[Group]:
        """What of the answered groups can be learned from, and where that is too little, of others that are then
        issued, answered and scored in their place."""
        kept = self._keep(answered)
        everything = answered
        self._check_some_scored(everything)
        for _ in range(MOST_TRIES - 1):
            missing = self.plan.prompts - len({group[0].issue for group in kept})
            if missing <= 0 or self.ledger.exhausted:
                break
            more = self.answerer.answer(self._asked(missing))
            kept += self._keep(more)
            everything = everything + more
            self._check_some_scored(everything)
        return kept

    def _asked(self, count: int) -> list[Group]:
        """The next prompts, so many at most, to which nothing is answered yet."""
        asked = self._ask(self.ledger.issue(count))
        return [group for groups in asked.values() for group in groups]

    def _ask(self, issued: Sequence[Issue]) -> dict[int, list[Group]]:
        """The prompts of these records, as trajectories without answers; records without any are dropped."""
        asked: dict[int, list[Group]] = {}
        for issue, prompts in zip(issued, self._prompts(issued), strict=True):
            reason = "the record has no prompt"
            for prompt in prompts:
                begun = self.answerer.begin(issue, prompt, self.plan.group) if isinstance(prompt, Prompt) else prompt
                if isinstance(begun, str):
                    reason = begun
                else:
                    asked.setdefault(issue.number, []).append(begun)
            if issue.number not in asked:
                self._drop(issue, reason, [{"issue": issue.number, "epoch": issue.epoch}])
        return asked

    def _keep(self, answered: Sequence[Group]) -> list[Group]:
        """The groups that can be learned from, with the samples that have a reward; records without any are dropped."""
        kept: list[Group] = []
        by_issue: dict[Issue, list[Group]] = {}
        for group in answered:
            by_issue.setdefault(group[0].issue, []).append(group)
        for issue, groups in by_issue.items():
            reasons = [self._useless(group) for group in groups]
            if all(reasons):
                lines = [one.line() for group in groups for one in group]
                self._drop(issue, str(reasons[0]), lines)
                continue
            for group, reason in zip(groups, reasons, strict=True):
                useful = [one for one in group if reason is None and not isinstance(one.score, Unscored)]
                kept += [useful] if useful else []
                self._lines += [one.line() for one in group if one not in useful]
        return kept

    def _useless(self, group: Group) -> str | None:
        scored = [one for one in group if not isinstance(one.score, Unscored)]
        if len(scored) < max(self.algorithm.least, 1):
            return UNSCORED
        if self.plan.resample and len({one.reward for one in scored}) == 1:
            return ALIKE
        return None

    def _check_some_scored(self, answered: Sequence[Group]) -> None:
        """DataError where every single sample failed: that is no accident of a few records."""
        samples = [one for group in answered for one in group]
        failed = [one.score for one in samples if isinstance(one.score, Unscored)]
        if failed and len(failed) == len(samples):
            raise DataError(
                f"Not one of {len(samples)} samples has a reward. The first: {failed[0].detail} Mend the function, "
                "or raise rollout.reward_seconds."
            )

    def _drop_the_rest(self) -> None:
        """Drop what is planned or being answered when the stage has made its steps."""
        for step in self._planned:
            for issue in step.issues:
                self._drop(issue, ENDED, [line for line in step.lines if line["issue"] == issue.number])
        left = [*self._rest, *(group for answering in self._ahead for group in answering.groups)]
        for issue in {group[0].issue: None for group in left}:
            self._drop(issue, ENDED, [{"issue": issue.number, "epoch": issue.epoch}])
        self._planned.clear()
        self._ahead.clear()
        self._rest.clear()

    def _drop(self, issue: Issue, reason: str, lines: Sequence[Mapping[str, Any]]) -> None:
        self.ledger.settle(issue, reason)
        self._lines += [{**line, "outcome": "dropped", "reason": reason} for line in lines]

    # --- steps ----------------------------------------------------------------------------------------------

    def _divide(self, groups: Sequence[Group], documents: list[Document], metrics: Mapping[str, float]) -> None:
        """Plan the optimiser steps of the round: in each pass every document once, prompts left whole."""
        plan = self.plan
        bundles: dict[Issue, list[int]] = {}
        lines: dict[Issue, list[Mapping[str, Any]]] = {}
        place = 0
        for group in groups:
            for one in group:
                bundles.setdefault(one.issue, []).append(place)
                advantage = documents[place].streams.get(ADVANTAGE.name)
                told = {} if advantage is None else {"advantage": float(advantage[documents[place].trained].mean())}
                lines.setdefault(one.issue, []).append({**one.line(), **told, "outcome": "trained"})
                place += 1
        tokens = sum(len(document) for document in documents)
        parts = max(min(plan.updates, len(bundles)), -(-tokens // plan.tokens)) if bundles else 0
        issues = list(bundles)
        for turn in range(plan.passes):
            for some in (issues[part::parts] for part in range(parts)):
                if not some:
                    continue
                self._planned.append(
                    PlannedStep(
                        documents=[number for issue in some for number in bundles[issue]],
                        epoch=some[0].epoch,
                        issues=some if turn == 0 else (),
                        lines=[line for issue in some for line in lines[issue]] if turn == 0 else (),
                        metrics=metrics,
                    )
                )
        self._documents = documents

    def _take(self) -> StepBlocks:
        """The next planned step, as this rank's blocks."""
        step = self._planned.popleft()
        documents = [self._documents[number] for number in step.documents]
        blocks: list[Block] = [
            tuple(Unit((documents[i],)) for i in pack)
            for pack in best_fit([len(document) for document in documents], self.plan.block)
        ]
        for issue in step.issues:
            self.ledger.settle(issue)
        self._lines += step.lines
        self._tell()
        self._step += 1
        share: list[Block] = blocks[self.workers.data_rank :: self.workers.data_world]
        empty: Block = ()
        return StepBlocks(
            blocks=share + [empty] * (-(-len(blocks) // self.workers.data_world) - len(share)),
            epoch=step.epoch,
            progress=self._step / self.plan.steps if self.plan.steps else self.ledger.progress or 0.0,
            documents=len(documents),
            tokens=sum(len(document) for document in documents),
            metrics={**step.metrics, **self._account()},
        )

    def _account(self) -> dict[str, float]:
        """The ledger, and where the time of the round went, as keys of a line of metrics."""
        return {
            "prompts_issued": float(self.ledger.issued),
            "prompts_trained": float(self.ledger.trained),
            "prompts_dropped": float(self.ledger.dropped.total()),
            **{f"seconds_{phase}": spent for phase, spent in self.phases.take().items()},
        }

    def _tell(self) -> None:
        self._journal.rollouts(self._step + 1, self._lines)
        self._lines = []

    # --- state ----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Where the next step begins, as JSON: the same on every rank and for every number of them."""
        left = list(self._planned)
        rest = [one for group in self._rest for one in group]
        issues = [*(issue for step in left for issue in step.issues), *{one.issue: None for one in rest}]
        state: dict[str, Any] = {
            "step": self._step,
            "ledger": self.ledger.state(issues),
            "rest": [one.state() for one in rest],
            "algorithm": self.algorithm.state(),
            "lines": self._told_last,
        }
        if left:
            numbers = sorted({number for step in left for number in step.documents})
            index = {number: place for place, number in enumerate(numbers)}
            documents = packed_documents([self._documents[number] for number in numbers])
            state["documents"] = base64.b64encode(documents).decode()
            state["planned"] = [
                {
                    "documents": [index[number] for number in step.documents],
                    "epoch": step.epoch,
                    "issues": [issue.number for issue in step.issues],
                    "lines": list(step.lines),
                    "metrics": dict(step.metrics),
                }
                for step in left
            ]
        return state

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue with the step that comes after ``state``. DataError if the data hold other rows than then."""
        self.ledger.load(state["ledger"])
        self.algorithm.load(state["algorithm"])
        self._step, self._lines = state["step"], list(state["lines"])
        known = {issue[0]: Issue(*issue) for issue in state["ledger"]["open"]}
        self._rest = self._restored(state["rest"], known)
        self._documents = unpacked_documents(base64.b64decode(state["documents"])) if "planned" in state else []
        self._planned = deque(
            PlannedStep(**{**step, "issues": [known[number] for number in step["issues"]]})
            for step in state.get("planned", [])
        )

    def _restored(self, rest: Sequence[Mapping[str, Any]], known: Mapping[int, Issue]) -> list[Group]:
        """What was cut, with its prompts read again."""
        issues = [known[number] for number in dict.fromkeys(one["issue"] for one in rest)]
        read = zip(issues, self._prompts(issues), strict=True)
        prompts = {(i.number, p.example_id): p for i, found in read for p in found if isinstance(p, Prompt)}
        groups: dict[tuple[int, str], Group] = {}
        for one in rest:
            key = (one["issue"], one["prompt"])
            groups.setdefault(key, []).append(Trajectory.restored(known[key[0]], prompts[key], one))
        return list(groups.values())

    def close(self) -> None:
        """Leave no process at work."""
        self.engine.close()
        if self.answerer.background is not None:
            self.answerer.background.shutdown(cancel_futures=True)
        self.answerer.pool.close()

    def __enter__(self) -> Rounds:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
