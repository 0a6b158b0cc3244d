"""Reward models: a scalar head on a language model learns which of several answers is better."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from postlude.data.example import Ranked
from postlude.manifest.change import from_step
from postlude.manifest.starter import StarterFiles
from postlude.objectives.objective import Objective
from postlude.recipes.recipe import TrainingRecipe

if TYPE_CHECKING:
    from postlude.data.document import Document, Unit


class RewardModel(TrainingRecipe):
    """A reward model from pairs or ranked lists of answers."""

    starter = StarterFiles(
        "postlude.recipes.starters",
        "reward.yaml",
        {"-answers.jsonl": "answers.jsonl", "-pairs.jsonl": "pairs.jsonl"},
    )

    changes = dict.fromkeys(("order", "margins", "centering"), from_step("the loss has it"))

    recipe: Literal["reward"]
    order: Literal["bradley_terry", "plackett_luce"] = "bradley_terry"
    """What a list of answers says: each pair of it by itself, or its whole order. Of two answers it is the same."""
    margins: bool = False
    """Ask for differences as large as those of the data's scores; without it only their order counts."""
    centering: Annotated[float, Field(ge=0)] = 0.0
    """How much the scores of a unit are drawn to a sum of zero; 0.01 is usual where prompts are compared."""

    @model_validator(mode="after")
    def _margins_are_of_pairs(self) -> Self:
        if self.margins and self.order != "bradley_terry":
            raise ValueError("'margins' belongs to 'order: bradley_terry'")
        return self

    @property
    def accepts(self) -> tuple[type, ...]:
        return (Ranked,)

    def units(self, documents: Sequence[Document]) -> tuple[Unit, ...]:
        from postlude.data.document import Unit

        return (Unit(tuple(documents)),)

    def objective(self) -> Objective:
        from postlude.objectives.ranking import Ranking

        return Ranking(self.order, self.margins, self.centering)
