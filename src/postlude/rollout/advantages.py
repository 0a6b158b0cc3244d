"""From rewards to advantages: how much better than expected a sample, or one of its tokens, was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

Baseline = Literal["group", "leave_one_out", "batch"]
Scale = Literal["group", "batch", "none"]

SMALLEST = 1e-6
"""Added to a deviation that is divided by."""


def relative(
    rewards: Sequence[float], groups: Sequence[int], baseline: Baseline = "group", scale: Scale = "group"
) -> np.ndarray:
    """How much better each sample's reward is than a baseline, float64 [samples].

    ``groups`` says which samples answer one prompt. The baseline is the mean of the ``group`` (GRPO, Shao et al.,
    2024), that of the group's other samples (``leave_one_out``: RLOO, Ahmadian et al., 2024), or that of all samples
    (``batch``: REINFORCE++, Hu, 2025). ``scale`` divides by the standard deviation (of n values by n - 1, as its
    estimates have it) of the group or of all the samples; where all are equal nothing is above the baseline.
    ValueError for a group of one under a baseline that is its group's.
    """
    values, index = np.asarray(rewards, np.float64), np.unique(np.asarray(groups), return_inverse=True)[1]
    sizes = np.bincount(index)
    if baseline != "batch" and len(values) and sizes.min() < 2:
        raise ValueError("A group of one sample has nothing to be compared with.")
    means = np.bincount(index, values) / sizes
    if baseline == "leave_one_out":
        others = (means * sizes)[index] - values
        advantages = values - others / (sizes - 1)[index]
    else:
        advantages = values - (means[index] if baseline == "group" else values.mean())
    if scale == "group":
        squares = np.bincount(index, (values - means[index]) ** 2)
        advantages /= np.sqrt(squares / np.maximum(sizes - 1, 1))[index] + SMALLEST
    elif scale == "batch" and len(values) > 1:
        advantages /= values.std(ddof=1) + SMALLEST
    if baseline != "batch":  # what is left where all are alike is rounding, and the scale would make it count
        highest, lowest = np.full(len(sizes), -np.inf), np.full(len(sizes), np.inf)
        np.maximum.at(highest, index, values)
        np.minimum.at(lowest, index, values)
        advantages[(highest == lowest)[index]] = 0.0
    return advantages


def generalized(rewards: np.ndarray, values: np.ndarray, gamma: float, lam: float) -> tuple[np.ndarray, np.ndarray]:
    """Generalised advantages of the tokens of one document and their returns, float64 [tokens] each.

    ``rewards`` are those that came after each token, ``values`` what was expected before it; after the last nothing is.
    With d_t = r_t + gamma v_{t+1} - v_t the advantage is the sum of (gamma lam)^k d_{t+k}, and the return is the
    advantage plus the value (Schulman et al., 2016).
    """
    following = np.append(values[1:], 0.0)
    deltas = rewards + gamma * following - values
    advantages = np.empty(len(deltas), np.float64)
    running = 0.0
    for token in range(len(deltas) - 1, -1, -1):
        running = deltas[token] + gamma * lam * running
        advantages[token] = running
    return advantages, advantages + values


def whiten(advantages: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Advantages of several documents' tokens, shifted and scaled so that all together have mean 0 and deviation 1."""
    if not advantages:
        return []
    together = np.concatenate(advantages)
    mean, deviation = together.mean(), together.std()
    return [(advantage - mean) / (deviation + SMALLEST) for advantage in advantages]
