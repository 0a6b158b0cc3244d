"""Merging: the weights of several models of one shape become one model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from postlude.manifest.component import Name
from postlude.manifest.schema import ModelPlace
from postlude.manifest.starter import StarterFiles
from postlude.recipes.recipe import WorkRecipe


class Merge(WorkRecipe):
    """A weighted average of models, task arithmetic, or the spherical interpolation of two."""

    does: ClassVar[str] = "postlude.stages.merging:Merging"
    starter = StarterFiles("postlude.recipes.starters", "merge.yaml", {".jsonl": "sums.jsonl"})

    recipe: Literal["merge"]
    models: Annotated[dict[Name, ModelPlace], Field(min_length=1)]
    """The models by names of one's choice. Config and tokenizer are those of the first."""
    method: Literal["average", "task_arithmetic", "slerp"] = "average"
    """``average``: the sum of the models times their weights, which are scaled to a sum of 1 (Wortsman et al., 2022).
    ``task_arithmetic``: the base and the weighted differences from it (Ilharco et al., 2023). ``slerp``: from the first
    model to the second along an arc (Shoemake, 1985), as far as the share of the second weight."""
    weights: dict[Name, float] = {}
    """By the names of the models; 1 where none is given."""
    base: ModelPlace | None = None
    """What the models of task arithmetic started from."""

    @model_validator(mode="after")
    def _method_has_its_models(self) -> Self:
        unknown = [name for name in self.weights if name not in self.models]
        if unknown:
            raise ValueError(f"'weights' names {', '.join(unknown)}, and the models are {', '.join(self.models)}")
        if (self.base is not None) != (self.method == "task_arithmetic"):
            raise ValueError("'base' belongs to 'method: task_arithmetic', which needs it")
        if self.method == "slerp" and len(self.models) != 2:
            raise ValueError(f"'method: slerp' is between two models, not {len(self.models)}")
        if self.method == "average" and len(self.models) < 2:
            raise ValueError("an average needs two models")
        if self.method != "task_arithmetic":
            weights = self.weights_in_full.values()
            if min(weights) < 0 or sum(weights) <= 0:
                raise ValueError(f"the weights of 'method: {self.method}' are from 0, and one at least is above it")
        return self

    @property
    def weights_in_full(self) -> Mapping[str, float]:
        """The weight of every model."""
        return {name: self.weights.get(name, 1.0) for name in self.models}

    def base_model(self) -> ModelPlace | None:
        return next(iter(self.models.values()))
