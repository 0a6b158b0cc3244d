"""On-policy distillation (Agarwal et al., 2024): the student answers, and learns at each token that it sampled the
distribution of a teacher, by the reverse divergence KL(student || teacher)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from postlude.manifest.change import from_step, never
from postlude.manifest.component import Positive
from postlude.manifest.schema import ModelPlace
from postlude.objectives.nll import WeightedLikelihood
from postlude.objectives.objective import Objective
from postlude.recipes.distill import Divergence
from postlude.recipes.online import OnlineRecipe
from postlude.training.program import Companion

if TYPE_CHECKING:
    from postlude.rollout.algorithm import Algorithm


class OnPolicyDistill(OnlineRecipe):
    """Distillation on the student's own answers."""

    starter = replace(
        OnlineRecipe.starter,
        values={"own_key": "    teacher: {from: sft}                  # a better model, with the same tokenizer\n"},
    )
    needs_reward: ClassVar[bool] = False

    changes = {
        "teacher": never("it is loaded before the first step"),
        **dict.fromkeys(("divergence", "beta"), from_step("the loss has it")),
    }

    recipe: Literal["on_policy_distill"]
    group: Positive = 1
    teacher: ModelPlace
    """The model that is learned from, with the student's tokenizer."""
    divergence: Divergence = "reverse_kl"
    """What is minimised at each token; see the recipe ``distill``."""
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """With ``jsd`` the teacher's share in the mixture that both are compared with."""

    def algorithm(self) -> Algorithm:
        from postlude.rollout.algorithm import NoAdvantages

        return NoAdvantages()

    def objective(self) -> Objective:
        from postlude.objectives.distillation import Distillation
        from postlude.objectives.divergence import Measure

        measure = Measure(self.divergence, self.beta, self.rollout.temperature, 0.0)
        return Distillation(measure, WeightedLikelihood("token"), None)

    def companions(self) -> Mapping[str, Companion]:
        return {"teacher": Companion(self.teacher)}
