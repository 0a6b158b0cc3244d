"""From a stage of online reinforcement learning to its trainer: the policy answers, and the loop makes the steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from postlude.data.dataset import Dataset
from postlude.data.document import WEIGHT, Document
from postlude.errors import DataError
from postlude.manifest.problem import ManifestError
from postlude.manifest.schema import ModelFrom, ModelPlace
from postlude.recipes.online import OnlineRecipe
from postlude.rollout.answers import Answerer
from postlude.rollout.assess import Assessor
from postlude.rollout.assessment import Assessment
from postlude.rollout.colocated import PolicyEngine
from postlude.rollout.engine import Sampling
from postlude.rollout.ledger import Issue, Ledger
from postlude.rollout.prompts import NoPrompt, Prompt, PromptEncoder, prompt_of
from postlude.rollout.reward_pool import RewardPool
from postlude.rollout.rounds import Rounds
from postlude.rollout.scoring import Score, Scorer, pass_at_k
from postlude.rollout.serving.external import ExternalEngine
from postlude.rollout.steps import RoundRules
from postlude.runs import Run
from postlude.stages.models import ForwardModels, stop_ids_of
from postlude.stages.online_engines import engine_of
from postlude.stages.parts import StageTask
from postlude.stages.prompts import count_left
from postlude.stages.training import Assembly
from postlude.telemetry.recorder import Recorder
from postlude.training.interruption import Interruption
from postlude.training.timing import Phases
from postlude.training.trainer import Trainer
from postlude.training.workers import Workers

EXTERNAL_CORRECTION = 2.0
MOST_GAP = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.05}
"""How far an engine's log-probabilities may be from the policy's on average, where both have the same weights."""


class Silent:
    """Rollouts are told nowhere."""

    def rollouts(self, step: int, lines: Sequence[Mapping[str, Any]]) -> None: ...

    def event(self, kind: str, **fields: Any) -> None: ...


class OnlineAssembly(Assembly, ForwardModels):
    """The parts of one stage of online reinforcement learning on one rank."""

    config: OnlineRecipe

    def __init__(
        self, task: StageTask, workers: Workers, sample: int | None = None, artifacts: Run | None = None
    ) -> None:
        super().__init__(task, workers, sample, artifacts)
        if not isinstance(self.config, OnlineRecipe):
            raise ManifestError(f"stages.{task.stage}: the recipe '{self.config.recipe}' answers no prompts.")
        self.journal: Any = Silent()

    # --- the loop -------------------------------------------------------------------------------------------

    @cached_property
    def loader(self) -> Rounds:  # type: ignore[override]
        """The loop, which makes steps of the policy's own answers."""
        config, batch = self.config, self.config.batch
        rules = RoundRules(
            prompts=config.rollout.prompts,
            group=config.group,
            updates=config.updates,
            passes=config.passes,
            block=batch.block,
            tokens=batch.tokens,
            steps=config.steps,
            oversample=config.rollout.oversample,
            ahead=config.rollout.ahead,
            resample=config.resample,
        )
        assessment = Assessment(
            self.assessor,
            config.algorithm(),
            self.journal.event,
            gap=MOST_GAP[self.precision.name],
            correction=self.correction,
            reference="reference" if config.compares else None,
            critic=config.critic,
        )
        return Rounds(
            rules,
            Ledger(self.datasets, config.data, self.manifest.seed, config.epochs),
            self.read_prompts,
            self.answerer,
            assessment,
            self.journal.rollouts,
        )

    @cached_property
    def policy_engine(self) -> PolicyEngine | ExternalEngine:
        """What answers."""
        return engine_of(self)

    @cached_property
    def correction(self) -> float | None:
        """The bound of the correction for an engine that is not quite the policy."""
        said = self.config.rollout.correction
        return EXTERNAL_CORRECTION if said is None and self.config.rollout.engine.is_external else said

    @cached_property
    def assessor(self) -> Assessor:
        batch = self.config.batch
        return Assessor(
            self.program.roles,
            self.workers,
            self.precision,
            batch.block,
            batch.micro or batch.block,
            self.config.rollout.temperature,
        )

    @cached_property
    def answerer(self) -> Answerer:
        rollout = self.config.rollout
        background = None
        if rollout.engine.is_external:
            # As many at a time as there are rounds; an engine that makes one after the other is asked so.
            at_once = rollout.ahead if rollout.engine.updates_in_flight else 1
            background = ThreadPoolExecutor(max(at_once, 1), "answers", torch.set_num_threads, (self.task.threads,))
        return replace(self._answerer(rollout.temperature, rollout.top_p), background=background)

    def _answerer(self, temperature: float, top_p: float) -> Answerer:
        rollout = self.config.rollout

        def sampling(source: str) -> Sampling:
            stops = self._stops(source)
            return Sampling(rollout.max_tokens, stops, temperature, top_p, self.manifest.seed)

        return Answerer(
            engine=self.policy_engine,
            encoder=self.prompt_encoder_of,
            sampling=sampling,
            scorer=self.scorer,
            pool=self.pool,
            workers=self.workers,
            phases=self.phases,
            tell=self.journal.event,
            room=self.config.batch.block,
            environment=self.config.environment,
            most_turns=rollout.turns or 8,
            few=len(self.task.engines) or None,
        )

    def _stops(self, source: str) -> frozenset[int]:
        if source not in self._stops_of:
            causal = self.program.roles["policy"].model.causal
            self._stops_of[source] = stop_ids_of(causal, self.prompt_encoder_of(source))
        return self._stops_of[source]

    @cached_property
    def phases(self) -> Phases:
        return Phases(synchronize=self.workers.device.type == "cuda")

    @cached_property
    def scorer(self) -> Scorer:
        return Scorer(self.config.reward, self.judge)

    @cached_property
    def pool(self) -> RewardPool:
        return RewardPool(self.config.rollout.reward_workers, float(self.config.rollout.reward_seconds))

    @cached_property
    def _stops_of(self) -> dict[str, frozenset[int]]:
        return {}

    @cached_property
    def _prompt_encoders(self) -> dict[str, PromptEncoder]:
        return {}

    def prompt_encoder_of(self, source: str) -> PromptEncoder:
        """How the prompts of a data set are put to the policy."""
        if source not in self._prompt_encoders:
            template = self.manifest.data[source].template
            self._prompt_encoders[source] = PromptEncoder(self.tokenizer, template, self.begun)
        return self._prompt_encoders[source]

    # --- prompts --------------------------------------------------------------------------------------------

    def read_prompts(self, issues: Sequence[Issue]) -> list[list[Prompt | str]]:
        """The prompts in each issued record, or why there is none."""
        found: dict[int, list[Prompt | str]] = {}
        by_group: dict[tuple[str, int], list[Issue]] = {}
        for issue in issues:
            by_group.setdefault((issue.source, issue.group), []).append(issue)
        for (source, group), some in by_group.items():
            dataset = self.datasets[source]
            for issue, (record, examples) in zip(
                some, dataset.read(group, [issue.position for issue in some]), strict=True
            ):
                found[issue.number] = [self._prompt(one, name, source, record) for name, one in examples]
        return [found[issue.number] for issue in issues]

    def _prompt(self, example: Any, example_id: str, source: str, record: Mapping[str, Any]) -> Prompt | str:
        """The prompt in an example, with the tools of the environment; why there is none."""
        try:
            found = prompt_of(example, example_id, source, record)
        except NoPrompt as error:
            return str(error)
        return found if self._tools is None else replace(found, tools=[*(found.tools or ()), *self._tools])

    @cached_property
    def _tools(self) -> list[dict[str, Any]] | None:
        environment = self.config.environment
        if environment is None:
            return None
        environment.check()
        return environment.tools()

    def counts(self) -> dict[str, Any]:
        """How many prompts there are and how long, and how many records have none that can be asked."""
        left: dict[str, Any] = {}
        lengths: list[int] = []
        for prompt, _ in self._every_prompt(self.datasets):
            begun = prompt if isinstance(prompt, str) else self._begun(prompt)
            if isinstance(begun, str):
                count_left(left, begun, prompt.example_id if isinstance(prompt, Prompt) else "")
            else:
                lengths.append(begun)
        if not lengths:
            why = ", ".join(f"{one['count']} because {reason}" for reason, one in left.items())
            raise DataError(f"The data of the stage '{self.task.stage}' hold no prompt that can be asked: {why}.")
        return {
            "prompts": len(lengths),
            "prompt_tokens": {"least": min(lengths), "mean": sum(lengths) / len(lengths), "most": max(lengths)},
            "nothing_of": left,
        }

    def prompts(self) -> Iterator[Document]:
        """The prompts as documents in which nothing is trained, for a preview."""
        for prompt, _ in self._every_prompt(self.datasets):
            if isinstance(prompt, Prompt):
                tokens = np.array(self.prompt_encoder_of(prompt.source).tokens(prompt), np.int64)
                if len(tokens):
                    streams = {WEIGHT.name: np.zeros(len(tokens), np.float32)}
                    yield Document(prompt.example_id, prompt.source, tokens, streams)

    def _begun(self, prompt: Prompt) -> int | str:
        """How many tokens a prompt has, or why it cannot be asked."""
        tokens = len(self.prompt_encoder_of(prompt.source).tokens(prompt))
        longest = self.config.batch.block - self.config.rollout.max_tokens
        return tokens if 0 < tokens <= longest else f"it has none or more than {longest} tokens"

    def _every_prompt(self, datasets: Mapping[str, Dataset]) -> Any:
        """Every prompt of data sets with its number, in the order they stand there."""
        number = 0
        for name, dataset in datasets.items():
            for group, rows in enumerate(dataset.groups):
                for start in range(0, rows, 256):
                    some = range(start, min(start + 256, rows))
                    for position, (record, examples) in zip(some, dataset.read(group, list(some)), strict=True):
                        for example_id, example in examples:
                            yield (
                                self._prompt(example, example_id, name, record),
                                Issue(number, 0, name, group, position),
                            )
                            number += 1

    # --- evaluation -----------------------------------------------------------------------------------------

    @property
    def evaluations(self) -> dict[str, Any]:
        """Nothing is held out for the loss."""
        return {}

    def examine(self) -> Mapping[str, Mapping[str, float]]:
        """The rewards of answers to held-out prompts."""
        evaluate = self.config.evaluate
        if evaluate is None:
            return {}
        self.policy_engine.update(self.loader.step)
        answerer = replace(self._answerer(evaluate.temperature, self.config.rollout.top_p), phases=Phases())
        found = {}
        for name, dataset in self.held_out.items():
            groups = [
                begun
                for prompt, issue in self._every_prompt({name: dataset})
                if isinstance(prompt, Prompt)
                and not isinstance(begun := answerer.begin(issue, prompt, evaluate.samples), str)
            ]
            if not groups:
                raise DataError(f"The held-out data '{name}' of the stage '{self.task.stage}' hold no prompt.")
            answered = answerer.answer(groups)
            rewards = [[one.reward for one in group if isinstance(one.score, Score)] for group in answered]
            found[name] = measured(rewards, evaluate.success, evaluate.samples) | {
                "completion_tokens": _mean([one.sampled_tokens for group in answered for one in group])
            }
        return found

    # --- the trainer ----------------------------------------------------------------------------------------

    def trainer(self, recorder: Recorder, stop: Callable[[bool], bool] | Interruption) -> Trainer:
        self.journal = recorder
        return super().trainer(recorder, stop)

    def with_models(self, start: ModelFrom, companions: Mapping[str, ModelPlace]) -> OnlineAssembly:
        other = super().with_models(start, companions)
        assert isinstance(other, OnlineAssembly)
        other.config = other.config.rehearsed()
        other.rehearses = True
        for built in ("policy_engine", "correction", "assessor", "answerer", "phases", "scorer", "pool"):
            other.__dict__.pop(built, None)
        return other


def measured(rewards: Sequence[Sequence[float]], success: float, samples: int) -> dict[str, float]:
    """What the rewards of each prompt's answers come to: their mean, and pass@k for the powers of two up to
    ``samples``; an answer passes whose reward is at least ``success``."""
    told = {"reward": _mean([reward for group in rewards for reward in group])}
    k = 1
    while k <= samples:
        passed = [(len(group), sum(reward >= success for reward in group)) for group in rewards if len(group) >= k]
        told[f"pass_at_{k}"] = _mean([pass_at_k(*counts, k) for counts in passed])
        k *= 2
    return told


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
