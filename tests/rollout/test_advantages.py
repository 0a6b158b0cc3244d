"""Advantages against TRL's definitions, reference loops, and their own properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from postlude.rollout.advantages import generalized, relative, whiten

numbers = st.floats(-10, 10, allow_nan=False, width=32)


@given(st.lists(st.lists(numbers, min_size=2, max_size=6), min_size=1, max_size=5))
def test_a_group_is_compared_with_itself(groups):
    rewards = [reward for group in groups for reward in group]
    index = [number for number, group in enumerate(groups) for _ in group]
    found = relative(rewards, index, "group", "none")
    expected = [reward - np.mean(group) for group in groups for reward in group]
    assert np.allclose(found, expected, atol=1e-9)
    others = relative(rewards, index, "leave_one_out", "none")
    alone = [r - np.mean([*g[:i], *g[i + 1 :]]) for g in groups for i, r in enumerate(g)]
    assert np.allclose(others, alone, atol=1e-9)


def test_the_scale_is_that_of_trl():
    rewards = np.array([1.0, 0.0, 0.5, 2.0, 2.0, 2.0, 0.0, 3.0])
    torch = pytest.importorskip("torch")
    grouped = torch.tensor(rewards).view(-1, 4)
    theirs = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-6)
    assert np.allclose(relative(rewards, [0] * 4 + [1] * 4), theirs.reshape(-1).numpy(), rtol=1e-9)


def test_a_round_is_a_baseline_for_single_samples():
    found = relative([1.0, 3.0, 2.0], [0, 1, 2], "batch", "batch")
    assert np.allclose(found, np.array([-1, 1, 0]) / (1 + 1e-6))


def test_all_alike_teaches_nothing_and_one_alone_is_refused():
    assert not relative([0.7] * 6, [0] * 3 + [1] * 3).any()
    with pytest.raises(ValueError, match="group of one"):
        relative([1.0, 2.0, 3.0], [0, 0, 1])


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=20), st.floats(0, 1), st.floats(0, 1))
def test_generalised_advantages_are_the_double_sum(tokens, gamma, lam):
    rewards, values = (np.array(column, np.float64) for column in zip(*tokens, strict=True))
    found, returns = generalized(rewards, values, gamma, lam)
    following = [*values[1:], 0.0]
    deltas = [r + gamma * n - v for r, n, v in zip(rewards, following, values, strict=True)]
    expected = [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]
    assert np.allclose(found, expected, atol=1e-6)
    assert np.allclose(returns - values, found)


def test_without_discount_and_with_lambda_one_the_return_is_the_reward_to_come():
    _, returns = generalized(np.array([0.0, 0.5, 1.0]), np.array([3.0, -2.0, 7.0]), 1.0, 1.0)
    assert np.allclose(returns, [1.5, 1.5, 1.0])


def test_white_advantages_have_no_mean_and_deviation_one():
    white = np.concatenate(whiten([np.array([1.0, 2.0]), np.array([9.0, -4.0, 0.0])]))
    assert abs(white.mean()) < 1e-12
    assert white.std() == pytest.approx(1, rel=1e-5)
    assert whiten([]) == []
