"""Distillation: a student learns, at each token that the masks select, the distribution of a teacher that is frozen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationInfo, field_validator

from postlude.manifest.change import from_step, never
from postlude.manifest.component import Positive
from postlude.manifest.schema import ModelPlace
from postlude.manifest.starter import StarterFiles
from postlude.objectives.nll import Normalizer, WeightedLikelihood
from postlude.objectives.objective import Objective
from postlude.recipes.recipe import TrainingRecipe
from postlude.training.program import Annotation, Companion

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]
BALANCED = 0.5
"""``beta`` where it is not given."""


class Teacher(ModelPlace):
    """The model that is learned from: exactly one of ``path`` and ``from``."""

    top_k: Positive | None = None
    """Run the teacher over the data once, before the first step, and store the probabilities of so many tokens that it
    finds likeliest, with that of all others together. Without it the teacher runs along, and all count."""


class Distill(TrainingRecipe):
    """Distillation on conversations, text or token ids."""

    starter = StarterFiles("postlude.recipes.starters", "distill.yaml", {".jsonl": "sums.jsonl"})

    changes = {
        "teacher": never("it is loaded, or asked, before the first step"),
        **dict.fromkeys(("divergence", "beta", "temperature", "hard_loss", "normalize"), from_step("the loss has it")),
    }

    recipe: Literal["distill"]
    teacher: Teacher
    """The model that is learned from, of any size, with the student's tokenizer. It is frozen, and runs along or, with
    ``top_k``, beforehand."""
    divergence: Divergence = "forward_kl"
    """What is minimised: KL(teacher || student), which covers all that the teacher does; KL(student || teacher), which
    keeps to what it mostly does; or the generalised Jensen-Shannon divergence between them."""
    beta: Annotated[float, Field(gt=0, lt=1)] | None = None
    """With ``jsd`` the teacher's share in the mixture that both are compared with, 0.5 by default."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Both models' logits are divided by it, and the divergence is multiplied by its square."""
    hard_loss: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The share of the negative log-likelihood of the data in the loss; the divergence has the rest."""
    normalize: Normalizer = "token"
    """What counts the same: each trained token (times its weight), or each document."""

    @field_validator("beta")
    @classmethod
    def _beta_is_used(cls, beta: float | None, info: ValidationInfo) -> float | None:
        chosen = info.data.get("divergence")
        if beta is not None and chosen in ("forward_kl", "reverse_kl"):
            raise ValueError(f"beta is a key of the divergence jsd, and {chosen} does not use it. Leave it out")
        return beta

    def objection(self, begun: Self, key: str) -> str | None:
        if self.teacher.top_k is not None and self.temperature != begun.temperature:
            return "the teacher was asked at the temperature that the stage began with, and its answers are stored"
        return super().objection(begun, key)

    def objective(self) -> Objective:
        from postlude.objectives.distillation import Distillation
        from postlude.objectives.divergence import Measure

        measure = Measure(self.divergence, self.beta or BALANCED, self.temperature, self.hard_loss)
        return Distillation(measure, WeightedLikelihood(self.normalize), self.teacher.top_k)

    def companions(self) -> Mapping[str, Companion]:
        return {} if self.teacher.top_k else {"teacher": Companion(self.teacher)}

    def annotations(self) -> Mapping[str, Annotation]:
        from postlude.objectives.annotators import LikeliestTokens

        if self.teacher.top_k is None:
            return {}
        return {"teacher": Annotation(self.teacher, LikeliestTokens(self.teacher.top_k, self.temperature))}
