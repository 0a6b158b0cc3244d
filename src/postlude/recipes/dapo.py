"""DAPO (Yu et al., 2025): GRPO with a higher bound upwards, tokens that all count the same, and no prompt without
anything to learn: one whose samples are all rewarded alike is dropped, and another issued in its place."""

from __future__ import annotations

from typing import Literal

from postlude.recipes.group_relative import Clip, GroupRelative, Normalize


class DAPO(GroupRelative):
    """GRPO with clip-higher, a loss by token and dynamic sampling."""

    recipe: Literal["dapo"]
    clip_high: Clip = 0.28
    normalize: Normalize = "token"
    resample: bool = True
