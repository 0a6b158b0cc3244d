"""Preference optimisation: a policy learns from pairs of answers, or from single ones that are wanted or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from postlude.data.example import Judged, Ranked
from postlude.manifest.schema import ModelPlace
from postlude.manifest.starter import StarterFiles
from postlude.recipes.recipe import TrainingRecipe

if TYPE_CHECKING:
    from postlude.data.document import Document, Unit
    from postlude.objectives.objective import Objective
    from postlude.training.program import Annotation, Companion

USED: dict[str, tuple[str, ...]] = {
    "sigmoid": ("label_smoothing", "reference", "precompute_reference"),
    "sigmoid_norm": ("label_smoothing", "reference", "precompute_reference"),
    "robust": ("label_smoothing", "reference", "precompute_reference"),
    "ipo": ("reference", "precompute_reference"),
    "hinge": ("reference", "precompute_reference"),
    "simpo": ("gamma", "label_smoothing"),
    "orpo": (),
    "kto": ("desirable_weight", "undesirable_weight", "reference"),
}
"""The keys that each loss reads beside ``beta``."""


class DPO(TrainingRecipe):
    """Direct preference optimisation and its kin, on pairs; and KTO on single judged answers."""

    starter = StarterFiles(
        "postlude.recipes.starters",
        "dpo.yaml",
        {"-answers.jsonl": "answers.jsonl", "-pairs.jsonl": "pairs.jsonl"},
    )

    recipe: Literal["dpo"]
    loss: Literal["sigmoid", "sigmoid_norm", "robust", "ipo", "hinge", "simpo", "orpo", "kto"] = "sigmoid"
    """``sigmoid`` is DPO itself, with ``label_smoothing`` conservative DPO; ``kto`` takes judged answers, all others
    take pairs. ``simpo`` and ``orpo`` have no reference."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """How much a difference in log-probability counts; in ``orpo`` the odds ratio beside the likelihood."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] | None = None
    """The share of pairs whose sides are taken for exchanged; 0 where it is not given."""
    gamma: float | None = None
    """The margin that ``simpo`` asks for; 0.5 where it is not given."""
    desirable_weight: Annotated[float, Field(gt=0)] | None = None
    """How much a wanted answer counts in ``kto``; 1 where it is not given."""
    undesirable_weight: Annotated[float, Field(gt=0)] | None = None
    """How much an unwanted answer counts in ``kto``; 1 where it is not given."""
    reference: ModelPlace | None = None
    """The frozen model that the policy is kept near; by default the model that the stage starts from."""
    precompute_reference: bool = False
    """Run the reference over the data once, before the first step, and store what it says of each answer's tokens:
    then only the policy is held while it is trained. ``kto`` puts answers to other prompts, and cannot."""

    @model_validator(mode="after")
    def _keys_have_a_use(self) -> Self:
        for key in dict.fromkeys(key for keys in USED.values() for key in keys):
            value = getattr(self, key)
            if value is not None and value is not False and key not in USED[self.loss]:
                losses = ", ".join(loss for loss, keys in USED.items() if key in keys)
                raise ValueError(f"'loss: {self.loss}' does not read '{key}': it belongs to {losses}")
        if self.loss == "robust" and not self.label_smoothing:
            raise ValueError("'loss: robust' needs 'label_smoothing', the share of pairs whose sides are exchanged")
        return self

    @property
    def accepts(self) -> tuple[type, ...]:
        return (Judged,) if self.loss == "kto" else (Ranked,)

    def units(self, documents: Sequence[Document]) -> tuple[Unit, ...]:
        """A pair; of a longer list the best answer and the worst."""
        from postlude.data.document import Unit

        if self.loss == "kto" or len(documents) == 2:
            return (Unit(tuple(documents)),)
        return (Unit((documents[0], documents[-1])),)

    def objective(self) -> Objective:
        if self.loss == "kto":
            from postlude.objectives.kto import KahnemanTversky

            given = {"desirable_weight": self.desirable_weight, "undesirable_weight": self.undesirable_weight}
            return KahnemanTversky(self.beta, **_given(given))
        from postlude.objectives.preference import PreferenceOptimisation, Settings

        settings = Settings(self.beta, **_given({"label_smoothing": self.label_smoothing, "gamma": self.gamma}))
        return PreferenceOptimisation(self.loss, settings, stored_reference=self.precompute_reference)

    def companions(self) -> Mapping[str, Companion]:
        from postlude.training.program import Companion

        if "reference" not in USED[self.loss] or self.precompute_reference:
            return {}
        return {"reference": Companion(self.reference or self.model)}

    def annotations(self) -> Mapping[str, Annotation]:
        from postlude.objectives.annotators import TokenLikelihood
        from postlude.training.program import Annotation

        if not self.precompute_reference:
            return {}
        return {"reference": Annotation(self.reference or self.model, TokenLikelihood())}


def _given(keys: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in keys.items() if value is not None}
