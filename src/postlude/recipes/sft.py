"""Supervised fine-tuning: negative log-likelihood of the tokens that the masks select."""

from __future__ import annotations

from typing import Annotated, Literal

from postlude.manifest.change import never
from postlude.manifest.component import Named, default_name
from postlude.manifest.starter import StarterFiles
from postlude.objectives.objective import Objective, ObjectiveConfig
from postlude.recipes.recipe import TrainingRecipe


class SFT(TrainingRecipe):
    """Supervised fine-tuning on conversations, text or token ids."""

    starter = StarterFiles("postlude.recipes.starters", "sft.yaml", {".jsonl": "sums.jsonl"})

    changes = {"loss": never("the step was built for it: its own keys may change")}

    recipe: Literal["sft"]
    loss: Annotated[ObjectiveConfig, Named("objectives")] = default_name("nll")
    """What is minimised, among the objectives that take single documents."""

    def objective(self) -> Objective:
        return self.loss.build()
