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

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from postlude.data.loader import StepBlocks
from postlude.errors import DataError
from postlude.rollout.answers import Answerer, Answering, Group, complete
from postlude.rollout.assessment import Assessment
from postlude.rollout.ledger import Issue, Ledger
from postlude.rollout.prompts import Prompt
from postlude.rollout.reward_pool import Unscored
from postlude.rollout.steps import RoundRules, StepQueue, own_blocks
from postlude.rollout.trajectory import Trajectory

ALIKE = "all samples have the same reward"
ENDED = "the stage has made its steps"
UNSCORED = "fewer samples than needed have a reward"
MOST_TRIES = 8
"""How often prompts are issued anew in a round, where some of them are of no use."""


class Rounds:
    """An iterator over steps (:class:`postlude.data.loader.StepBlocks`), as the trainer takes it.

    ``prompts`` reads the prompts of issued records, or why there are none; ``tell_rollouts`` takes, before each step,
    its number and the lines of what became of prompts. Iterating raises DataError if nothing that was answered can be
    trained on.
    """

    def __init__(
        self,
        rules: RoundRules,
        ledger: Ledger,
        prompts: Callable[[Sequence[Issue]], list[list[Prompt | str]]],
        answerer: Answerer,
        assessment: Assessment,
        tell_rollouts: Callable[[int, Sequence[Mapping[str, Any]]], None],
    ) -> None:
        self.rules, self.ledger, self.assessment = rules, ledger, assessment
        self.answerer, self.workers, self.phases = answerer, answerer.workers, answerer.phases
        self._prompts, self._tell_rollouts, self.engine = prompts, tell_rollouts, answerer.engine
        self.step = 0
        """Steps that were handed out."""
        self._ahead: deque[Answering] = deque()
        """The rounds that are being answered."""
        self._cut: list[Group] = []
        """What was cut when a round was complete, to go on with the next."""
        self._collected_at = time.perf_counter()
        self._planned = StepQueue()
        self._lines: list[Mapping[str, Any]] = []
        """What is to be told with the next step."""
        self._last_lines: list[Mapping[str, Any]] = []
        """What was told after the last step: a resume from there has cut it away."""

    def __iter__(self) -> Iterator[StepBlocks]:
        return self

    def __next__(self) -> StepBlocks:
        settled_before = self.ledger.settled
        while not self._planned and self.step != self.rules.steps and (self._ahead or self._has_prompts):
            self._check_fruitful(settled_before)
            self.turn()
        if self._planned and self.step != self.rules.steps:
            return self._next_step()
        self._drop_the_rest()
        self._last_lines = list(self._lines)
        self._tell()
        raise StopIteration

    def turn(self) -> None:
        """One round: the loop itself. What is ``ahead`` is answered while this round is assessed and trained on."""
        if not self._ahead:
            self._begin(1)
        finished = self.answerer.finish(self._ahead.popleft())
        cut = {group[0].issue for group in finished if not complete(group)}
        self._cut += [group for group in finished if group[0].issue in cut]  # these go on with the next round
        busy = self._measure_busy()
        self._begin(min(self.rules.ahead, self._rounds_left() - 1))
        groups = self._collect([group for group in finished if group[0].issue not in cut])
        with self.phases.measure("assess"):
            documents, metrics = self.assessment.of(groups, self.step)
        self._planned.fill(self.rules, groups, documents, {**metrics, **busy})

    @property
    def between(self) -> bool:
        """Whether the next step begins a round of which nothing has been answered yet."""
        return not self._planned and not self._ahead

    def amend(
        self, rules: RoundRules, weights: Mapping[str, float], answerer: Answerer, assessment: Assessment
    ) -> None:
        """Make rounds otherwise from the next one on, of prompts drawn with these ``weights``. The answerer and the
        assessment go on with what those before had."""
        assessment.take_over(self.assessment)
        self.rules, self.answerer, self.assessment = rules, answerer, assessment
        self.ledger.reweigh(weights)

    # --- a round --------------------------------------------------------------------------------------------

    @property
    def _has_prompts(self) -> bool:
        """Whether there is something left to be answered."""
        return bool(self._cut) or not self.ledger.exhausted

    def _begin(self, rounds: int) -> None:
        """Give the engine the weights as they are, and see to it that so many rounds are being answered."""
        if len(self._ahead) >= rounds or not self._has_prompts:
            return
        with self.phases.measure("sync"):
            self.engine.update(self.step)
        while len(self._ahead) < rounds and self._has_prompts:
            going_on, self._cut = self._cut, []
            wanted = math.ceil(self.rules.prompts * self.rules.oversample) - len({group[0].issue for group in going_on})
            begun = self._issue(max(wanted, 0))
            cuts = self.rules.oversample > 1 and not self.ledger.exhausted
            self._ahead.append(self.answerer.start(going_on + begun, self.rules.prompts if cuts else None))

    def _rounds_left(self) -> int:
        """How many rounds the steps that are left will take, this one included; far too many where no number of steps
        ends the stage."""
        if self.rules.steps is None:
            return sys.maxsize
        return -(-(self.rules.steps - self.step) // (self.rules.updates * self.rules.passes))

    def _measure_busy(self) -> dict[str, float]:
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
        kept: list[Group] = []
        everything: list[Group] = []
        for tries_left in reversed(range(MOST_TRIES)):
            kept += self._keep(answered)
            everything += answered
            self._check_any_scored(everything)
            missing = self.rules.prompts - len({group[0].issue for group in kept})
            if missing <= 0 or self.ledger.exhausted or not tries_left:
                break
            answered = self.answerer.answer(self._issue(missing))
        return kept

    def _issue(self, count: int) -> list[Group]:
        """The next prompts, so many at most, as trajectories without answers; records without any are dropped."""
        groups: list[Group] = []
        issued = self.ledger.issue(count)
        for issue, prompts in zip(issued, self._prompts(issued), strict=True):
            begun = [
                self.answerer.begin(issue, prompt, self.rules.group) if isinstance(prompt, Prompt) else prompt
                for prompt in prompts
            ]
            trajectories = [group for group in begun if not isinstance(group, str)]
            groups += trajectories
            if not trajectories:
                reasons = ["the record has no prompt", *map(str, begun)]
                self._drop(issue, reasons[-1], [{"issue": issue.number, "epoch": issue.epoch}])
        return groups

    def _keep(self, answered: Sequence[Group]) -> list[Group]:
        """The groups that can be learned from, with the samples that have a reward; records without any are dropped."""
        kept: list[Group] = []
        by_issue: dict[Issue, list[Group]] = {}
        for group in answered:
            by_issue.setdefault(group[0].issue, []).append(group)
        for issue, groups in by_issue.items():
            reasons = [self._why_useless(group) for group in groups]
            if all(reasons):
                self._drop(issue, str(reasons[0]), [sample.line() for group in groups for sample in group])
                continue
            for group, reason in zip(groups, reasons, strict=True):
                useful = [sample for sample in group if reason is None and not isinstance(sample.score, Unscored)]
                kept += [useful] if useful else []
                self._lines += [sample.line() for sample in group if sample not in useful]
        return kept

    def _why_useless(self, group: Group) -> str | None:
        scored = [sample for sample in group if not isinstance(sample.score, Unscored)]
        if len(scored) < max(self.assessment.algorithm.least, 1):
            return UNSCORED
        if self.rules.resample and len({sample.reward for sample in scored}) == 1:
            return ALIKE
        return None

    def _check_any_scored(self, answered: Sequence[Group]) -> None:
        """DataError where every single sample failed: that is no accident of a few records."""
        samples = [sample for group in answered for sample in group]
        failed = [sample.score for sample in samples if isinstance(sample.score, Unscored)]
        if failed and len(failed) == len(samples):
            raise DataError(
                f"Not one of {len(samples)} samples has a reward. The first: {failed[0].detail} Mend the function, "
                "or raise rollout.reward_seconds."
            )

    def _check_fruitful(self, settled_before: int) -> None:
        """DataError where as many prompts as there are, beyond those settled before, have given nothing to train on."""
        if self.ledger.settled - settled_before > sum(self.ledger.rows.values()):
            why = "; ".join(f"{count} because {reason}" for reason, count in self.ledger.dropped.most_common())
            raise DataError(
                f"A whole pass over the prompts has given nothing to train on. Dropped so far were {why}. Look at the "
                "prompts, at batch.block and rollout.max_tokens, and at the reward."
            )

    # --- what becomes of it ---------------------------------------------------------------------------------

    def _next_step(self) -> StepBlocks:
        """The next planned step, as this rank's blocks."""
        step, documents = self._planned.take()
        for issue in step.issues:
            self.ledger.settle(issue)
        self._lines += step.lines
        self._tell()
        self.step += 1
        account = {
            "prompts_issued": float(self.ledger.issued),
            "prompts_trained": float(self.ledger.trained),
            "prompts_dropped": float(self.ledger.dropped.total()),
            **{f"seconds_{phase}": spent for phase, spent in self.phases.take().items()},
        }
        return StepBlocks(
            blocks=own_blocks(documents, self.rules.block, self.workers),
            epoch=step.epoch,
            progress=self.step / self.rules.steps if self.rules.steps else self.ledger.progress or 0.0,
            documents=len(documents),
            tokens=sum(len(document) for document in documents),
            metrics={**step.metrics, **account},
        )

    def _drop_the_rest(self) -> None:
        """Drop what is planned or being answered when the stage has made its steps."""
        for step in self._planned:
            for issue in step.issues:
                self._drop(issue, ENDED, [line for line in step.lines if line["issue"] == issue.number])
        left = [*self._cut, *(group for answering in self._ahead for group in answering.groups)]
        for issue in {group[0].issue: None for group in left}:
            self._drop(issue, ENDED, [{"issue": issue.number, "epoch": issue.epoch}])
        self._planned = StepQueue()
        self._ahead.clear()
        self._cut.clear()

    def _drop(self, issue: Issue, reason: str, lines: Sequence[Mapping[str, Any]]) -> None:
        self.ledger.settle(issue, reason)
        self._lines += [{**line, "outcome": "dropped", "reason": reason} for line in lines]

    def _tell(self) -> None:
        self._tell_rollouts(self.step + 1, self._lines)
        self._lines = []

    # --- state ----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Where the next step begins, as JSON: the same on every rank and for every number of them."""
        cut = [sample for group in self._cut for sample in group]
        planned = [issue for step in self._planned for issue in step.issues]
        return {
            "step": self.step,
            "ledger": self.ledger.state([*planned, *{sample.issue: None for sample in cut}]),
            "rest": [sample.state() for sample in cut],
            "algorithm": self.assessment.algorithm.state(),
            "lines": self._last_lines,
            **self._planned.state(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue with the step that comes after ``state``. DataError if the data hold other rows than then."""
        self.ledger.load(state["ledger"])
        self.assessment.algorithm.load(state["algorithm"])
        self.step, self._lines = state["step"], list(state["lines"])
        issues = {issue[0]: Issue(*issue) for issue in state["ledger"]["open"]}
        self._cut = self._restore_cut(state["rest"], issues)
        self._planned.load(state, issues)

    def _restore_cut(self, samples: Sequence[Mapping[str, Any]], known: Mapping[int, Issue]) -> list[Group]:
        """What was cut, from the states of its samples, with its prompts read again."""
        issues = [known[number] for number in dict.fromkeys(sample["issue"] for sample in samples)]
        prompts = {
            (issue.number, prompt.example_id): prompt
            for issue, in_record in zip(issues, self._prompts(issues), strict=True)
            for prompt in in_record
            if isinstance(prompt, Prompt)
        }
        groups: dict[tuple[int, str], Group] = {}
        for sample in samples:
            key = (sample["issue"], sample["prompt"])
            groups.setdefault(key, []).append(Trajectory.restored(known[key[0]], prompts[key], sample))
        return list(groups.values())

    def close(self) -> None:
        """Leave no process at work."""
        self.engine.close()
        if self.answerer.background is not None:
            self.answerer.background.shutdown(cancel_futures=True)
        self.answerer.scorer.pool.close()
