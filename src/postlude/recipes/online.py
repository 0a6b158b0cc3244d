"""Online reinforcement learning: a policy is trained on its own answers to prompts, and on what rewards say of them.

This is what all its algorithms share: how prompts are answered and scored, and how many of them make a round. An
algorithm is a short recipe that derives from :class:`OnlineRecipe` and says which loss, which advantages and which
other models it has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from postlude.manifest.amend import change_of
from postlude.manifest.change import Change, from_round, from_step, never
from postlude.manifest.component import Name, Named, Positive
from postlude.manifest.schema import Evaluate, ModelPlace
from postlude.manifest.starter import StarterFiles
from postlude.recipes.answering import REHEARSED_TOKENS, Answering
from postlude.recipes.recipe import TrainingRecipe
from postlude.rollout.engines.native import Native
from postlude.rollout.environment import Environment
from postlude.rollout.reward import Reward
from postlude.training.program import Companion

if TYPE_CHECKING:
    from postlude.objectives.policy import PolicyGradient
    from postlude.rollout.algorithm import Algorithm


class Rollout(Answering):
    """How prompts are answered."""

    later: ClassVar[tuple[str, ...]] = ("record_tokens",)
    changes: ClassVar[Mapping[str, Change]] = {
        "pool": never("its engines run there"),
        **dict.fromkeys(("oversample", "ahead"), never("rounds that are being answered were begun with it")),
        "prompts": from_round("a round has so many"),
        **dict.fromkeys(("temperature", "top_p"), from_round("the round is sampled with it")),
        "turns": from_round("episodes of the round have so many at most"),
        "correction": from_round("the round's samples are corrected up to it"),
        "max_tokens": never("what fits into a block, and into memory, was planned with it"),
        "engine": never("its processes run as it says"),
        "record_tokens": never("it is read when the stage starts: another value may be given to a resume"),
        **dict.fromkeys(
            ("concurrency", "engine_seconds", "reward_seconds", "reward_workers"),
            never("processes have it since they started"),
        ),
    }

    pool: Name | None = None
    """The pool of ``compute.pools`` that the engines have for themselves, one for each of its workers: on devices of
    their own, and warm when those that train are started anew. By default each worker that trains has one beside it."""
    oversample: Annotated[float, Field(ge=1)] | Positive = 1.0
    """So many times the prompts of a round are answered at a time. A round is over when its prompts are complete, so
    that it does not wait for the longest answers; these are cut, kept, and go on first of all in the next."""
    ahead: Annotated[int, Field(ge=0)] = 0
    """Rounds that are being answered while one is trained: no token is sampled by weights that are more rounds old than
    so many (and one more with ``oversample``). With 0 engine and trainer wait for each other, and a run repeats bitwise
    wherever it was killed; more needs an external engine."""
    prompts: Positive = 16
    """Prompts of a round, over all workers."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Logits are divided by it, where tokens are sampled and where they are trained."""
    concurrency: Positive = 256
    """Completions that a worker makes at a time."""
    correction: Annotated[float, Field(gt=0)] | None = None
    """The trainer finds out itself how likely each sampled token was, and it counts in proportion to that against how
    likely the engine found it, at most so much (truncated importance sampling). By default 2 for an external engine;
    one that is the policy itself is believed: on a CPU it differs by rounding alone, in bf16 by more
    (``behaviour_gap`` in the metrics tells)."""
    record_tokens: Annotated[int, Field(ge=0)] = 64
    """Of every so many-th prompt the rollouts keep each token of its answers, with what engine and trainer say of it: a
    pass of the policy over these answers more. 0 keeps none; nothing of it bears on the training."""


class OnlineEvaluate(Evaluate):
    """Answers to held-out prompts."""

    changes = dict.fromkeys(("samples", "temperature", "success"), from_step("what is held out is measured with it"))

    samples: Positive = 1
    """Completions of each prompt; with several, pass@k is told for the powers of two up to their number."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 takes the likeliest token."""
    success: float = 1.0
    """A completion succeeds whose reward is at least this: what pass@k counts."""

    @model_validator(mode="after")
    def _samples_differ(self) -> Self:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("several samples at temperature 0 are all the same: set 'temperature', or 'samples' to 1")
        return self


class OnlineRecipe(TrainingRecipe):
    """Base of the recipes of online reinforcement learning."""

    does: ClassVar[str] = "postlude.stages.online:OnlineTraining"
    half: ClassVar[str] = "bf16"
    pool_keys: ClassVar[tuple[str, ...]] = ("pool", "rollout.pool")
    free: ClassVar[tuple[str, ...]] = (*TrainingRecipe.free, "rollout.record_tokens")
    needs_reward: ClassVar[bool] = True
    starter: ClassVar[StarterFiles] = StarterFiles("postlude.recipes.starters", "online.yaml", values={"own_key": ""})

    changes = {
        "rollout": never("the engine was started as it says"),
        "data": from_round("the prompts that are drawn for the round, and from then on, follow the weights"),
        "group": from_round("each prompt of the round has so many samples"),
        "reward": never("its parts are loaded when the stage starts: their weights may change"),
        "environment": never("its processes run as it says"),
        **dict.fromkeys(("updates", "passes"), from_round("the round is trained in so many")),
        "resample": from_round("it says what becomes of prompts whose samples are all rewarded alike"),
        "reference": never("it is loaded before the first step"),
    }

    rollout: Rollout = Rollout()
    """How prompts are answered."""
    group: Positive = 8
    """Samples of each prompt."""
    reward: list[Reward] = []
    """What says how good a completion is: the sum of these parts."""
    environment: Annotated[Environment, Named("environments")] | None = None
    """What answers between the turns of the policy, and may reward them. What it says is not trained on."""
    updates: Positive = 1
    """Optimiser steps of one pass over a round: its prompts are divided among them; among more
    where a round has more than ``batch.tokens`` tokens."""
    passes: Positive = 1
    """How often each round is trained on."""
    reference: ModelPlace | None = None
    """The frozen model that the policy is compared with; by default the model that the stage starts from."""
    evaluate: OnlineEvaluate | None = None
    """Answers to held-out prompts, if they are wanted."""

    @model_validator(mode="after")
    def _has_a_reward(self) -> Self:
        if self.rollout.turns is not None and self.environment is None:
            raise ValueError("'rollout.turns' needs an 'environment', which answers between turns")
        if self.needs_reward and not self.reward and self.environment is None:
            raise ValueError("'reward' is needed: a list of functions and models that say how good a completion is")
        if self.evaluate is not None and not self.reward and self.environment is None:
            raise ValueError("'evaluate' needs 'reward', which says how good the answers to held-out prompts are")
        if self.rollout.max_tokens >= self.batch.block:
            raise ValueError(
                f"rollout.max_tokens ({self.rollout.max_tokens}) leaves no room for a prompt in batch.block "
                f"({self.batch.block}). Raise batch.block, or lower rollout.max_tokens"
            )
        engine = self.rollout.engine
        if self.rollout.ahead and not engine.is_external:
            raise ValueError(
                "'rollout.ahead' needs an engine that answers while the policy is trained: set rollout.engine to "
                "{name: native, apart: true} or to vllm"
            )
        if self.rollout.pool is not None and (not engine.is_external or engine.runs_already):
            raise ValueError(
                "'rollout.pool' is for engines that are started there: set rollout.engine to {name: native, apart: "
                "true} or to vllm without addresses"
            )
        if self.rollout.pool == self.pool:
            raise ValueError(f"the pool '{self.pool}' is that of the workers that train: name another one")
        if self.rollout.oversample > 1 and self.environment is not None:
            raise ValueError("an episode is not cut in its midst: leave 'rollout.oversample' out, or 'environment'")
        objection = engine.objection(self.rollout.top_p, self.rollout.ahead)
        if objection is not None:
            raise ValueError(objection)
        if engine.is_external and self.adapter is not None and self.adapter.base is not None:
            raise ValueError("an external engine takes over unpacked weights: leave 'adapter.base' out, or 'apart'")
        if self.parallel.divides and not engine.is_external:
            raise ValueError(
                "a policy that workers hold together does not answer by itself: set rollout.engine to {name: native, "
                "apart: true} or to vllm, or leave 'parallel' out"
            )
        return self

    @property
    def accepts(self) -> tuple[type, ...]:
        from postlude.rollout.prompts import PROMPTING

        return PROMPTING

    # --- what an algorithm says -----------------------------------------------------------------------------

    def algorithm(self) -> Algorithm:
        """How rewards become advantages."""
        raise NotImplementedError

    resample: bool = False
    """Prompts whose samples are all rewarded alike teach nothing: drop them, and issue others in their place."""

    @property
    def critic(self) -> str | None:
        """The model of the step that says what was to be expected."""
        return None

    @property
    def compares(self) -> bool:
        """Whether the reference is asked about each sample."""
        return False

    def companions(self) -> Mapping[str, Companion]:
        return {"reference": Companion(self.reference or self.model)} if self.compares else {}

    def policy_gradient(self, **keys: Any) -> PolicyGradient:
        """The loss of the policy, with what follows from the keys that all algorithms share."""
        from postlude.objectives.policy import PolicyGradient

        return PolicyGradient(
            longest=self.rollout.max_tokens,
            temperature=self.rollout.temperature,
            measures_reference=self.compares,
            **keys,
        )

    def objection(self, begun: Self, key: str) -> str | None:
        rollout = self.rollout
        if rollout.ahead and change_of(self, key).holds == "round":
            return "rollout.ahead is above 0, so rounds that were begun without it are still to be trained on"
        if rollout.oversample > 1 and key in ("rollout.temperature", "rollout.top_p"):
            return "rollout.oversample is above 1, so answers that were begun without it go on in later rounds"
        return super().objection(begun, key)

    def rehearsed(self) -> Self:
        rollout = self.rollout.model_copy(
            update={
                "prompts": 2,
                "max_tokens": min(self.rollout.max_tokens, REHEARSED_TOKENS),
                "engine": Native(),
                "pool": None,
                "ahead": 0,
                "oversample": 1.0,
            }
        )
        less = {"rollout": rollout, "group": min(self.group, 2), "resample": False, "steps": 1, "epochs": None}
        return super().rehearsed().model_copy(update=less)
