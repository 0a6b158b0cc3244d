"""RLOO (Ahmadian et al., 2024): A = r - mean(r of the group's other samples), without clipping or scaling, with the
divergence from the reference in the reward."""

from __future__ import annotations

from typing import Literal

from postlude.recipes.group_relative import Coefficient, GroupRelative, Normalize, Surrogate
from postlude.rollout.advantages import Baseline, Scale


class RLOO(GroupRelative):
    """REINFORCE with the other samples of a prompt as the baseline."""

    recipe: Literal["rloo"]
    baseline: Baseline = "leave_one_out"
    scale: Scale = "none"
    surrogate: Surrogate = "plain"
    normalize: Normalize = "length"
    kl_in_reward: Coefficient = 0.05
