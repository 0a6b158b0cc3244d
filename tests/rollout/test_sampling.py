"""Tokens are drawn as the distribution says, by numbers without a history."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from postlude.rollout.sampling import choose, stream_key, uniforms

LOGITS = torch.tensor([2.0, 1.0, 0.5, -1.0, 0.0, 1.5])


def draw(temperature: float, top_p: float, count: int = 40_000) -> torch.Tensor:
    numbers = uniforms([stream_key(0, "prompt", sample) for sample in range(count)], position=3)
    tokens, _ = choose(LOGITS.expand(count, -1), numbers, temperature, top_p)
    return torch.bincount(tokens, minlength=len(LOGITS)) / count


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_probabilities(temperature):
    expected = (LOGITS / temperature).softmax(-1)
    assert torch.allclose(draw(temperature, 1.0), expected, atol=0.01)


def test_the_nucleus_is_cut_out_and_scaled_up():
    expected = LOGITS.softmax(-1)
    # 0.39, 0.24 and 0.15 reach 0.7 with the third: 0.39 + 0.24 < 0.7 <= 0.39 + 0.24 + 0.15.
    nucleus = torch.tensor([True, True, False, False, False, True])
    assert expected[[0, 5]].sum() < 0.7 <= expected[nucleus].sum()
    expected = expected.where(nucleus, 0) / expected[nucleus].sum()
    found = draw(1.0, 0.7)
    assert torch.allclose(found, expected, atol=0.01)
    assert not found[~nucleus].any()


def test_a_nucleus_of_almost_nothing_is_the_likeliest_token():
    assert draw(1.0, 1e-9, 100).tolist() == [1, 0, 0, 0, 0, 0]


def test_log_probabilities_are_those_before_the_nucleus_and_at_the_temperature():
    tokens, values = choose(LOGITS.expand(50, -1), np.linspace(0, 0.99, 50), 0.7, 0.9)
    assert torch.allclose(values, (LOGITS / 0.7).log_softmax(-1)[tokens])
    tokens, values = choose(LOGITS.expand(1, -1), np.zeros(1), 0.0, 1.0)
    assert tokens.tolist() == [0]
    assert torch.allclose(values, LOGITS.log_softmax(-1)[:1])


@pytest.mark.parametrize("number", [0.0, 1.0 - 2.0**-53])
def test_the_outermost_numbers_choose_tokens_that_have_a_probability(number):
    logits = torch.full((1, 5), -torch.inf)
    logits[0, 1:4] = torch.tensor([0.0, 1.0, -3.0])
    token, value = choose(logits, np.array([number]), 1.0, 1.0)
    assert token.item() in (1, 3)
    assert value.isfinite().all()


def test_numbers_are_even_and_depend_on_every_part_of_their_key():
    keys = [stream_key(seed, prompt, sample) for seed in (0, 1) for prompt in ("a", "b") for sample in (0, 1)]
    assert len(set(keys)) == 8
    numbers = np.stack([uniforms(keys, position) for position in range(2000)])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert np.allclose(numbers.mean(0), 0.5, atol=0.03)
    assert np.abs(np.corrcoef(numbers.T) - np.eye(8)).max() < 0.1
    assert uniforms(keys[3:4], 17) == numbers[17, 3]
