"""What becomes of an example that is longer than a block, and nothing about where it came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Policy = Literal["right", "left", "drop", "split"]
"""Cut off the end, cut off the beginning, drop the example, or make it several documents."""

TOO_LONG = "longer than the block"
NOTHING_LEFT = "truncation left nothing to train on"
"""Reasons for which an example is dropped."""


@dataclass(frozen=True)
class Truncated:
    """The stretches of an example that are kept."""

    spans: Sequence[tuple[int, int]]
    """From one token to before another. None if the example is dropped."""
    cut: int = 0
    """Tokens that are in no stretch."""
    dropped: str | None = None
    """Why the example is dropped, if it is."""


def truncate(weights: np.ndarray, block: int, policy: Policy) -> Truncated:
    """What is kept of an example with these ``weights``, [tokens], in blocks of ``block`` tokens.

    The first token of a stretch is predicted from nothing and cannot be trained. So each stretch of ``split`` begins
    with the last token of the one before, and every trained token is trained once. A stretch without one is left out.
    """
    length = len(weights)
    if length <= block:
        return Truncated([(0, length)])
    if policy == "drop":
        return Truncated([], dropped=TOO_LONG)
    if policy == "split":
        spans = [(start, min(start + block, length)) for start in range(0, length - 1, max(block - 1, 1))]
    else:
        spans = [(0, block)] if policy == "right" else [(length - block, length)]
    kept = [(start, end) for start, end in spans if weights[start + 1 : end].any()]
    if not kept:
        return Truncated([], dropped=NOTHING_LEFT)
    covered = np.zeros(length, dtype=bool)
    for start, end in kept:
        covered[start:end] = True
    return Truncated(kept, cut=length - int(covered.sum()))


def shared_limit(lengths: Sequence[int], block: int) -> int:
    """How long each of several documents may be that stay in one block together: the shorter ones leave their room
    to the longer ones.
    """
    room = block
    for place, length in enumerate(sorted(lengths)):
        share = room // (len(lengths) - place)
        if length > share:
            return share
        room -= length
    return block
