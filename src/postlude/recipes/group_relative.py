"""What the algorithms share that need no critic: a sample is as good as its reward is above a baseline.

The loss is that of :mod:`postlude.objectives.policy`. Each algorithm is a recipe that gives these keys its defaults.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from postlude.manifest.change import from_round, from_step
from postlude.objectives.objective import Objective
from postlude.recipes.online import OnlineRecipe
from postlude.rollout.advantages import Baseline, Scale

if TYPE_CHECKING:
    from postlude.rollout.algorithm import Algorithm

Clip = Annotated[float, Field(gt=0)]
ClipBelow = Annotated[float, Field(gt=0, lt=1)]
Coefficient = Annotated[float, Field(ge=0)]
Ratio = Literal["token", "sequence"]
Surrogate = Literal["clip", "cispo", "plain"]
Normalize = Literal["token", "document", "length"]


class GroupRelative(OnlineRecipe):
    """Base of the recipes without a critic."""

    starter = replace(
        OnlineRecipe.starter,
        values={"own_key": "    group: 8                              # samples of each prompt\n"},
    )

    changes = {
        **dict.fromkeys(
            ("clip", "clip_high", "ratio", "surrogate", "normalize", "entropy"), from_step("the loss has it")
        ),
        **dict.fromkeys(("baseline", "scale"), from_round("advantages are made with it")),
        "kl": from_round("the loss of the round's samples has it"),
        "kl_in_reward": from_round("the rewards of the round's samples are charged with it"),
    }

    clip: ClipBelow = 0.2
    """A token's probability counts as changed by at most so much downwards, and by ``clip_high`` upwards."""
    clip_high: Clip = 0.2
    """The bound upwards: larger than ``clip``, rare tokens can become likely (DAPO's clip-higher)."""
    baseline: Baseline = "group"
    """What a reward is compared with: the mean of its group, of the group's other samples, or of the whole round."""
    scale: Scale = "group"
    """Advantages are divided by the deviation of the group's rewards, of all the round's, or not at all."""
    ratio: Ratio = "token"
    """Whether each token's change of probability counts, or the geometric mean over its sample."""
    surrogate: Surrogate = "clip"
    """``clip`` takes the gradient from tokens past the bound, ``cispo`` only bounds their weight, ``plain`` neither."""
    normalize: Normalize = "document"
    """What counts the same: each token, each sample, or each token divided by the longest sample there may be."""
    kl: Coefficient = 0.0
    """How much the divergence from the reference counts in the loss."""
    kl_in_reward: Coefficient = 0.0
    """How much it is taken from the reward instead."""
    entropy: Coefficient = 0.0
    """How much the entropy of the policy is rewarded."""

    @model_validator(mode="after")
    def _group_has_others(self) -> Self:
        if self.baseline != "batch" and self.group < 2:
            raise ValueError(
                "a group of one has nothing to compare with: set 'group' to 2 or more, or 'baseline: batch'"
            )
        if self.reference is not None and not self.compares:
            raise ValueError("'reference' is read with 'kl' or 'kl_in_reward' above 0 only: set one, or leave it out")
        return self

    @property
    def compares(self) -> bool:
        return bool(self.kl or self.kl_in_reward)

    def algorithm(self) -> Algorithm:
        from postlude.rollout.algorithm import Relative

        return Relative(self.baseline, self.scale, self.kl_in_reward)

    def objective(self) -> Objective:
        return self.policy_gradient(
            surrogate=self.surrogate,
            ratio=self.ratio,
            normalize=self.normalize,
            clip_low=self.clip,
            clip_high=self.clip_high,
            kl_coefficient=self.kl,
            entropy_coefficient=self.entropy,
        )
