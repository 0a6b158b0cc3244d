"""Dr. GRPO (Liu et al., 2025, "Understanding R1-Zero-like training"): GRPO without what favours long wrong answers and
easy or hard prompts. A = r - mean(r of the group), and each sample's tokens are divided by the same number."""

from __future__ import annotations

from typing import Literal

from postlude.recipes.group_relative import GroupRelative, Normalize
from postlude.rollout.advantages import Scale


class DrGRPO(GroupRelative):
    """GRPO whose advantages are not scaled and whose samples are not divided by their lengths."""

    recipe: Literal["dr_grpo"]
    scale: Scale = "none"
    normalize: Normalize = "length"
