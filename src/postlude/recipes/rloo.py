"""RLOO (Ahmadian et al., 2024): A = r - mean(r of the group's other samples), without clipping or scaling, with the
divergence from the reference in the reward."""

from __future__ import annotations

from typing import Literal

from postlude.recipes.group_relative import Coefficient, GroupRelative


class RLOO(GroupRelative):
    """REINFORCE with the other samples of a prompt as the baseline."""

    recipe: Literal["rloo"]
    baseline: Literal["group", "leave_one_out", "batch"] = "leave_one_out"
    scale: Literal["group", "batch", "none"] = "none"
    surrogate: Literal["clip", "cispo", "plain"] = "plain"
    normalize: Literal["token", "document", "length"] = "length"
    kl_in_reward: Coefficient = 0.05
