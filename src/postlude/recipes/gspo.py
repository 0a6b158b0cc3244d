"""GSPO (Zheng et al., 2025): the ratio is that of the whole sample, (p(sample) / p_old(sample))^(1/length), and so is
the clipping, whose bounds are narrower for it."""

from __future__ import annotations

from typing import Literal

from postlude.recipes.group_relative import Clip, ClipBelow, GroupRelative, Ratio


class GSPO(GroupRelative):
    """GRPO with the ratio of sequences."""

    recipe: Literal["gspo"]
    ratio: Ratio = "sequence"
    clip: ClipBelow = 3e-4
    clip_high: Clip = 4e-4
