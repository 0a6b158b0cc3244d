"""Generation: a model answers prompts, rewards say how well, and what is kept becomes a data set.

Responses of a teacher, best of n, rejection sampling, and preference pairs of a model's own outputs are one recipe
with other keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from postlude.manifest.component import Config
from postlude.manifest.schema import ModelPlace
from postlude.manifest.starter import StarterFiles
from postlude.manifest.types import Positive
from postlude.rollout.reward import Reward
from postlude.stages.work import Datasets, Work, WorkRecipe

if TYPE_CHECKING:
    from postlude.stages.workbench import Workbench

REHEARSED_TOKENS = 8


class Sampled(Config):
    """How a model answers."""

    samples: Positive = 1
    """Completions of each prompt."""
    max_tokens: Positive = 256
    """The longest completion, in tokens."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """0 takes the likeliest token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Only the likeliest tokens that together have this probability are drawn from."""
    seed: int | None = None
    """What the randomness follows from; by default the manifest's. The same prompt is answered in the same way."""
    concurrency: Positive = 64
    """Completions that a worker makes at a time."""

    def rehearsal(self) -> dict[str, Any]:
        """The keys that make a preflight of it short."""
        return {
            "samples": min(self.samples, 2),
            "max_tokens": min(self.max_tokens, REHEARSED_TOKENS),
        }


class KeepSome(Config):
    """Which completions are kept."""

    exactly_one: ClassVar[tuple[tuple[str, ...], ...]] = (("above", "top"),)

    above: float | None = None
    """Those whose reward is above this: rejection sampling."""
    top: Positive | None = None
    """So many of each prompt, the best first."""


class Generate(WorkRecipe, Sampled):
    """A model's answers to prompts as a data set: all, the best, those above a reward, or pairs."""

    starter = StarterFiles("postlude.recipes.starters", "generate.yaml", {".jsonl": "sums.jsonl"})

    recipe: Literal["generate"]
    model: ModelPlace
    """The model that answers."""
    data: Datasets
    """Where the prompts come from: conversations, whose last turn of the assistant is left out, or texts."""
    reward: list[Reward] = []
    """What says how good a completion is."""
    keep: Literal["all", "best", "pairs"] | KeepSome = "all"
    """``all`` completions, the ``best`` of each prompt, the best and the worst as ``pairs`` for a preference, ``{above:
    THRESHOLD}`` or ``{top: NUMBER}``."""

    @model_validator(mode="after")
    def _keep_can_be_told(self) -> Self:
        if self.keep != "all" and not self.reward:
            raise ValueError("what is kept depends on the reward, so 'reward' is needed, unless 'keep' is 'all'")
        if self.keep == "pairs" and self.samples < 2:
            raise ValueError(
                "'keep: pairs' takes the best and the worst of a prompt's completions: set 'samples' to 2 or more"
            )
        return self

    def begin(self, bench: Workbench) -> Work:
        from postlude.stages.generation import Generation

        return Generation(self, bench)

    def rehearsed(self) -> Self:
        return self.model_copy(update=self.rehearsal())
