"""REINFORCE++ (Hu, 2025): one sample of a prompt is enough, since advantages are those over the mean of the whole round
and scaled by its deviation, with PPO's clipping and the divergence from the reference in the reward."""

from __future__ import annotations

from typing import Literal

from postlude.manifest.component import Positive
from postlude.recipes.group_relative import Coefficient, GroupRelative, Normalize
from postlude.recipes.online import OnlineRecipe
from postlude.rollout.advantages import Baseline, Scale


class ReinforcePlusPlus(GroupRelative):
    """REINFORCE with the round as the baseline."""

    starter = OnlineRecipe.starter

    recipe: Literal["reinforce++"]
    group: Positive = 1
    baseline: Baseline = "batch"
    scale: Scale = "batch"
    normalize: Normalize = "token"
    kl_in_reward: Coefficient = 0.01
