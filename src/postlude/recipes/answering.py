"""The keys with which a stage says how prompts are answered and rewarded: the same wherever prompts are."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from postlude.manifest.component import Config, Named, Positive, Seed, default_name
from postlude.rollout.engines.native import Native
from postlude.rollout.environment import Environment
from postlude.rollout.reward import Reward
from postlude.rollout.serving.server import EngineChoice

Seconds = Annotated[float, Field(gt=0)] | Positive
DEADLINES = ("engine_seconds", "reward_seconds", "reward_workers")
"""Keys that cannot change what a stage makes of a model that is not trained: they end it, or do not."""
REHEARSED_TOKENS = 8
"""The longest completion in a preflight."""


class Rewarding(Config):
    """How reward functions are called."""

    reward_workers: Positive = 2
    """Processes of each worker in which reward functions run."""
    reward_seconds: Seconds = 60
    """How long a reward function may take for one completion. Where a policy is trained, one that takes longer, or
    fails, leaves the completion without a reward: it is not trained on, and counted. Elsewhere the stage ends."""


class Answering(Rewarding):
    """How prompts are answered."""

    engine: Annotated[EngineChoice, Named("engines", default="native")] = default_name("native")
    """What answers: ``native`` is the model itself, in the process of the stage or (``apart: true``) in one of its own;
    ``vllm`` a server of vLLM."""
    engine_seconds: Seconds = 600
    """How long an external engine may take to answer before it counts as hung and another takes its place."""
    max_tokens: Positive = 256
    """The longest completion, in tokens."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Only the likeliest tokens that together have this probability are drawn from."""
    turns: Positive | None = None
    """The most turns of the model in an episode, with an ``environment``; by default 8."""


class Sampled(Answering):
    """How a model answers that is not trained."""

    later: ClassVar[tuple[str, ...]] = ("engine",)

    reward: list[Reward] = []
    """What says how good a completion is: the sum of these parts."""
    environment: Annotated[Environment, Named("environments")] | None = None
    """What answers between the turns of the model, and may reward them."""
    samples: Positive = 1
    """Completions of each prompt."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """0 takes the likeliest token."""
    seed: Seed | None = None
    """What the randomness follows from; by default the manifest's. The same prompt is answered in the same way."""
    concurrency: Positive = 64
    """Completions that a worker makes at a time."""
    context: Positive | None = None
    """Tokens that a prompt and its answers may have together; by default what the model has positions for."""

    @model_validator(mode="after")
    def _turns_have_an_environment(self) -> Self:
        if self.turns is not None and self.environment is None:
            raise ValueError("'turns' needs an 'environment', which answers between turns")
        return self

    @property
    def is_rewarded(self) -> bool:
        """Whether something says how good a completion is."""
        return bool(self.reward) or self.environment is not None

    def shortened(self) -> dict[str, Any]:
        """The keys that make a preflight of it short."""
        return {
            "samples": min(self.samples, 2),
            "max_tokens": min(self.max_tokens, REHEARSED_TOKENS),
            "engine": Native(),
        }
