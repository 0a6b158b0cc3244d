"""Evaluation: models side by side, by what they generate, by what they choose, and by their held-out loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from postlude.manifest.component import Config, Name, Positive
from postlude.manifest.schema import ModelPlace
from postlude.manifest.starter import StarterFiles
from postlude.recipes.answering import DEADLINES, Sampled
from postlude.recipes.recipe import Datasets, WorkRecipe


class ByGeneration(Sampled):
    """The mean reward of what a model generates."""

    data: Datasets
    """Where the prompts come from."""
    success: float = 1.0
    """A completion succeeds whose reward is at least this: what pass@k counts."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    limit: Positive | None = None
    """Use only so many records of each data set."""

    @model_validator(mode="after")
    def _has_a_reward(self) -> Self:
        if not self.is_rewarded:
            raise ValueError("'reward' is needed: a list of functions and models that say how good a completion is")
        return self


class ByChoice(Config):
    """Which of several answers a model finds the likeliest."""

    data: Datasets
    """Records with several answers, the right one first: those of the format ``multiple_choice``, or preferences."""
    limit: Positive | None = None
    """Use only so many records of each data set."""


class ByLoss(Config):
    """The loss per token on held-out data."""

    data: Datasets
    """What a training stage could be trained on."""
    limit: Positive | None = None
    """Use only so many records of each data set."""


class Evaluate(WorkRecipe):
    """A report on one or several models: rewards of what they generate, choices, held-out loss."""

    exactly_one: ClassVar[tuple[tuple[str, ...], ...]] = (("model", "models"),)
    does: ClassVar[str] = "postlude.stages.evaluation:Evaluation"
    free: ClassVar[tuple[str, ...]] = tuple(f"generation.{key}" for key in DEADLINES)

    starter = StarterFiles(
        "postlude.recipes.starters",
        "evaluate.yaml",
        {".jsonl": "sums.jsonl", "-choices.jsonl": "choices.jsonl"},
    )

    recipe: Literal["evaluate"]
    model: ModelPlace | None = None
    """The model."""
    models: Annotated[dict[Name, ModelPlace], Field(min_length=1)] | None = None
    """Several models by the names under which the report compares them."""
    generation: ByGeneration | None = None
    """The mean reward of what is generated, and pass@k."""
    choice: ByChoice | None = None
    """Multiple choice by likelihood."""
    held_out: ByLoss | None = None
    """The loss per token."""
    block: Positive = 8192
    """The longest example of ``choice`` and ``held_out``, in tokens, and how many go through a model at a time."""

    @model_validator(mode="after")
    def _something_is_evaluated(self) -> Self:
        if self.generation is None and self.choice is None and self.held_out is None:
            raise ValueError("nothing is evaluated: give one or several of 'generation', 'choice' and 'held_out'")
        return self

    @property
    def named_models(self) -> Mapping[str, ModelPlace]:
        """The models by name; a single one is called ``model``."""
        if self.models is not None:
            return self.models
        assert self.model is not None
        return {"model": self.model}

    def rehearsed(self) -> Self:
        if self.generation is None:
            return self
        return self.model_copy(update={"generation": self.generation.model_copy(update=self.generation.shortened())})
