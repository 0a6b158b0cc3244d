"""GRPO, group-relative policy optimisation (Shao et al., 2024): A = (r - mean(r of the group)) / deviation(r of the
group), the same at all tokens of a sample, clipped as in PPO, in the mean over each sample and then over samples."""

from __future__ import annotations

from typing import Literal

from postlude.recipes.group_relative import GroupRelative


class GRPO(GroupRelative):
    """Group-relative policy optimisation."""

    recipe: Literal["grpo"]
