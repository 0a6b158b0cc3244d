"""Supervised fine-tuning: negative log-likelihood of the tokens that the masks select."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from postlude.manifest.component import Component, Named
from postlude.manifest.starter import StarterFiles
from postlude.recipes.recipe import TrainingRecipe

if TYPE_CHECKING:
    from postlude.objectives.objective import Objective


class SFT(TrainingRecipe):
    """Supervised fine-tuning on conversations, text or token ids."""

    starter = StarterFiles("postlude.recipes.starters", "sft.yaml", {".jsonl": "sums.jsonl"})

    recipe: Literal["sft"]
    loss: Annotated[Component, Named("objectives"), Field(validate_default=True)] = "nll"  # type: ignore[assignment]
    """What is minimised, among the objectives that take single documents."""

    def objective(self) -> Objective:
        return self.loss.build()  # type: ignore[attr-defined]
