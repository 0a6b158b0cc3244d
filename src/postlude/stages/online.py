"""Stages of online reinforcement learning: the policy answers, and the loop makes the trainer's steps of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from postlude.data.preview import Preview, token_texts
from postlude.errors import DataError
from postlude.recipes.online import OnlineRecipe
from postlude.rollout.answers import Answerer
from postlude.rollout.assessment import Assessment
from postlude.rollout.engine import Sampling
from postlude.rollout.ledger import Issue, Ledger
from postlude.rollout.prompts import NotAsked, Prompt, PromptEncoders
from postlude.rollout.reward import remarks_on
from postlude.rollout.reward_pool import RewardPool
from postlude.rollout.rounds import Rounds
from postlude.rollout.scoring import Score, Scorer, passes
from postlude.rollout.steps import RoundRules
from postlude.stages.boundaries import remark_on_asked
from postlude.stages.engines import policy_engine, stop_ids_of
from postlude.stages.models import Models
from postlude.stages.parts import Parts
from postlude.stages.prompts import (
    PromptReader,
    count_prompts,
    encoders_of,
    preview_prompts,
    rows_of,
    tell_unprinted,
)
from postlude.stages.rehearsal import rehearse
from postlude.stages.report import StageReport, Trial
from postlude.stages.training import Supply, Training
from postlude.telemetry.recorder import Recorder
from postlude.training.frozen import Assessor
from postlude.training.interruption import Interruption
from postlude.training.meters import Phases
from postlude.training.program import Summary

EXTERNAL_CORRECTION = 2.0
"""The bound of the correction for an engine that is not quite the policy, where the manifest gives none."""
MOST_TURNS = 8
"""Turns of an episode, where the manifest gives no number."""
MOST_GAP = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.05}
"""How far an engine's log-probabilities may be from the policy's on average, where both have the same weights."""


class NoJournal:
    """Rollouts are told nowhere: in a rehearsal."""

    def rollouts(self, step: int, lines: Sequence[Mapping[str, Any]]) -> None: ...

    def event(self, kind: str, **fields: Any) -> None: ...


class OnlineTraining:
    """A stage that trains on what its own policy answers."""

    def __init__(self, parts: Parts) -> None:
        self.parts, self.config = parts, parts.config_of(OnlineRecipe)
        self.training = Training(parts)
        self.data, self.models = self.training.data, self.training.models

    def run(self, recorder: Recorder, stop: Interruption) -> Summary:
        return self.training.train(recorder, stop, lambda stored: self.supply(recorder))

    @property
    def finished_tokenizer(self) -> PreTrainedTokenizerBase:
        return self.training.finished_tokenizer

    # --- the loop -------------------------------------------------------------------------------------------

    def supply(self, journal: Recorder | NoJournal) -> Supply:
        """The loop, which makes steps of the policy's own answers, and the measure of answers to held-out prompts.
        Nothing is held out for the loss."""
        if remarks := remarks_on(self.config.reward):
            journal.event("rewards_work", remarks=remarks)
        config, answerer = self.config, self._answerer(journal.event)
        ledger = Ledger(self.data.datasets, config.data, self.parts.manifest.seed, config.epochs)
        rounds = Rounds(self._rules(), ledger, self._read, answerer, self._assessment(), journal.rollouts)

        def amend(amended: OnlineRecipe) -> None:
            self.config = amended
            answerer.scorer.reweigh(amended.reward)
            sampling, turns = self._sampling(amended.rollout.temperature), amended.rollout.turns or MOST_TURNS
            going_on = replace(answerer, sampling=sampling, most_turns=turns)
            rounds.amend(self._rules(), amended.data, going_on, self._assessment())

        return Supply(
            rounds,
            examine=lambda: self._examine(rounds.answerer, rounds.step),
            amend=amend,
            between_rounds=lambda: rounds.between,
        )

    def _rules(self) -> RoundRules:
        config, rollout, batch = self.config, self.config.rollout, self.config.batch
        return RoundRules(
            prompts=rollout.prompts,
            group=config.group,
            updates=config.updates,
            passes=config.passes,
            block=batch.block,
            tokens=batch.tokens,
            steps=config.steps,
            oversample=rollout.oversample,
            ahead=rollout.ahead,
            resample=config.resample,
        )

    def _assessment(self) -> Assessment:
        config, rollout, batch = self.config, self.config.rollout, self.config.batch
        models, workers = self.models, self.parts.workers
        external = EXTERNAL_CORRECTION if rollout.engine.is_external else None
        assessor = Assessor(
            models.program.roles,
            workers,
            models.precision,
            batch.block,
            batch.micro or batch.block,
            rollout.temperature,
        )
        return Assessment(
            assessor,
            config.algorithm(),
            gap=MOST_GAP[models.precision.name],
            correction=external if rollout.correction is None else rollout.correction,
            reference="reference" if config.compares else None,
            critic=config.critic,
            record_tokens=rollout.record_tokens,
            texts=lambda ids: token_texts(ids, self.data.tokenizer),
        )

    def _answerer(self, tell: Callable[..., None]) -> Answerer:
        rollout, block = self.config.rollout, self.config.batch.block
        background = None
        if rollout.engine.is_external:
            # As many at a time as there are rounds; an engine that makes one after the other is asked so.
            at_once = rollout.ahead if rollout.engine.updates_in_flight else 1
            background = ThreadPoolExecutor(
                max(at_once, 1), "answers", torch.set_num_threads, (self.parts.task.threads,)
            )
        pool = RewardPool(rollout.reward_workers, float(rollout.reward_seconds))
        return Answerer(
            engine=policy_engine(self.models),
            encoders=self.encoders,
            sampling=self._sampling(rollout.temperature),
            scorer=Scorer(self.config.reward, Models(self.parts).reward_model, pool),
            workers=self.parts.workers,
            phases=Phases(synchronize=self.parts.workers.device.type == "cuda"),
            tell=tell,
            room=block,
            longest_prompt=block - rollout.max_tokens,
            environment=self.config.environment,
            most_turns=rollout.turns or MOST_TURNS,
            few=len(self.parts.task.engines) or None,
            background=background,
        )

    def _sampling(self, temperature: float) -> Callable[[str], Sampling]:
        """How the prompts of each data set are answered."""
        rollout, samplings = self.config.rollout, dict[str, Sampling]()

        def sampling(source: str) -> Sampling:
            if source not in samplings:
                policy = self.models.program.roles["policy"].model.causal
                stops = stop_ids_of(policy.generation_config, self.encoders[source])
                seed = self.parts.manifest.seed
                samplings[source] = Sampling(rollout.max_tokens, stops, temperature, rollout.top_p, seed)
            return samplings[source]

        return sampling

    def _read(self, issues: Sequence[Issue]) -> list[list[Prompt | str]]:
        """The prompts in each issued record, or why there is none."""
        read = self._reader.read([(issue.source, issue.group, issue.position) for issue in issues])
        return [[prompt.reason if isinstance(prompt, NotAsked) else prompt for prompt in prompts] for prompts in read]

    def _examine(self, answerer: Answerer, version: int) -> Mapping[str, Mapping[str, float]]:
        """The rewards of answers to held-out prompts by the policy after ``version`` steps."""
        evaluate = self.config.evaluate
        if evaluate is None:
            return {}
        answerer.engine.update(version)
        answerer = replace(answerer, sampling=self._sampling(evaluate.temperature), phases=Phases(), background=None)
        measured = {}
        for name, dataset in self.data.held_out.items():
            rows = list(rows_of({name: dataset}))
            prompts = chain.from_iterable(PromptReader({name: dataset}, self.config.environment).read(rows))
            groups = [
                begun
                for number, prompt in enumerate(prompts)
                if isinstance(prompt, Prompt)
                and not isinstance(
                    begun := answerer.begin(Issue(number, 0, name, 0, number), prompt, evaluate.samples), str
                )
            ]
            if not groups:
                raise DataError(f"The held-out data '{name}' of the stage '{self.parts.task.stage}' hold no prompt.")
            answered = answerer.answer(groups)
            rewards = [[sample.reward for sample in group if isinstance(sample.score, Score)] for group in answered]
            chances = passes(rewards, evaluate.success, evaluate.samples)
            measured[name] = {
                "reward": _mean(list(chain.from_iterable(rewards))),
                **{f"pass_at_{k}": _mean(values) for k, values in chances.items()},
                "completion_tokens": _mean([sample.sampled_tokens for group in answered for sample in group]),
            }
        return measured

    # --- prompts --------------------------------------------------------------------------------------------

    @cached_property
    def _reader(self) -> PromptReader:
        return PromptReader(self.data.datasets, self.config.environment)

    @cached_property
    def encoders(self) -> PromptEncoders:
        """How the prompts are put to the policy."""
        return encoders_of(self.parts, self.data.tokenizer, [*self.data.datasets, *self.data.held_out])

    def _every_prompt(self) -> Any:
        return self._reader.read_all(rows_of(self.data.datasets))

    # --- before it runs -------------------------------------------------------------------------------------

    def preview(self, blocks: int, example: str | None = None) -> Preview:
        return preview_prompts(self._every_prompt(), self.encoders, blocks, example)

    def preflight(self, report: StageReport, synthetic: int | None) -> None:
        """Its prompts are counted; its memory is planned; and small models answer two prompts and are trained on that,
        with one real optimiser step."""
        longest = self.config.batch.block - self.config.rollout.max_tokens
        counts = self._count(self._reader, report, longest)
        if self.data.held_out:
            held_out = PromptReader(self.data.held_out, self.config.environment)
            counts = {**counts, "held_out": self._count(held_out, report, longest)}
        report.trial = Trial(counts, None, "the small step below answers two of the prompts")
        report.remarks += remarks_on(self.config.reward)
        small = OnlineTraining(self.parts.rehearsal())
        report.rehearsal = rehearse(self.models, small.models, lambda: small.supply(NoJournal()).steps)

    def _count(self, reader: PromptReader, report: StageReport, longest: int) -> dict[str, Any]:
        """Of prompts what is counted; what should be known of them goes into the report."""
        every = reader.read_all(rows_of(reader.datasets))
        counts = count_prompts(self.parts.task.stage, every, self.encoders, longest)
        tell_unprinted(report, self.parts, counts)
        report.remarks += remark_on_asked(self.parts, reader.read_all(rows_of(reader.datasets)), self.encoders)
        return counts


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
