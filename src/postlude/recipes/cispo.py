"""CISPO (MiniMax, 2025, "MiniMax-M1"): every token keeps its gradient, and only the weight of the ratio is bounded."""

from __future__ import annotations

from typing import Literal

from postlude.recipes.group_relative import Clip, GroupRelative, Normalize, Surrogate


class CISPO(GroupRelative):
    """GRPO whose ratios are bounded weights of the likelihood's gradient."""

    recipe: Literal["cispo"]
    surrogate: Surrogate = "cispo"
    clip_high: Clip = 4.0
    normalize: Normalize = "token"
