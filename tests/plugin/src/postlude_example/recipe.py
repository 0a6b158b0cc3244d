"""A recipe of a user's own: supervised fine-tuning that is kept from growing too sure."""

from __future__ import annotations

from typing import Annotated, Literal

from postlude.manifest.component import Named
from postlude.manifest.starter import StarterFiles
from postlude.objectives.objective import ObjectiveConfig
from postlude.recipes.recipe import TrainingRecipe


class ConfidentSFT(TrainingRecipe):
    """Likelihood with a penalty on low entropy (Pereyra et al., 2017)."""

    starter = StarterFiles("postlude_example.starters", "confident_sft.yaml", {".jsonl": "scripts.jsonl"})

    recipe: Literal["confident_sft"]
    loss: Annotated[ObjectiveConfig, Named("objectives")]

    def objective(self):
        return self.loss.build()
