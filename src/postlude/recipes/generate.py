"""Generation: a model answers prompts, rewards say how well, and what is kept becomes a data set.

Responses of a teacher, best of n, rejection sampling, and preference pairs of a model's own outputs are one recipe
with other keys.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import model_validator

from postlude.manifest.component import Config, Positive
from postlude.manifest.schema import ModelPlace
from postlude.manifest.starter import StarterFiles
from postlude.recipes.answering import DEADLINES, Sampled
from postlude.recipes.recipe import Datasets, WorkRecipe


class KeepSome(Config):
    """Which completions are kept."""

    exactly_one: ClassVar[tuple[tuple[str, ...], ...]] = (("above", "top"),)

    above: float | None = None
    """Those whose reward is above this: rejection sampling."""
    top: Positive | None = None
    """So many of each prompt, the best first."""


class Generate(WorkRecipe, Sampled):
    """A model's answers to prompts as a data set: all, the best, those above a reward, or pairs."""

    does: ClassVar[str] = "postlude.stages.generation:Generation"
    free: ClassVar[tuple[str, ...]] = DEADLINES
    starter = StarterFiles("postlude.recipes.starters", "generate.yaml", {".jsonl": "sums.jsonl"})

    recipe: Literal["generate"]
    model: ModelPlace
    """The model that answers."""
    data: Datasets
    """Where the prompts come from: conversations, whose last turn of the assistant is left out, or texts."""
    keep: Literal["all", "best", "pairs"] | KeepSome = "all"
    """``all`` completions, the ``best`` of each prompt, the best and the worst as ``pairs`` for a preference, ``{above:
    THRESHOLD}`` or ``{top: NUMBER}``."""

    @model_validator(mode="after")
    def _keep_can_be_told(self) -> Self:
        if self.keep != "all" and not self.is_rewarded:
            raise ValueError("what is kept depends on the reward, so 'reward' is needed, unless 'keep' is 'all'")
        if self.keep == "pairs" and self.samples < 2:
            raise ValueError(
                "'keep: pairs' takes the best and the worst of a prompt's completions: set 'samples' to 2 or more"
            )
        return self

    def rehearsed(self) -> Self:
        return self.model_copy(update=self.shortened())
