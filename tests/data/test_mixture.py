"""The mixture: which source each draw comes from, and where its epochs end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postlude.data import mixture as module
from postlude.data.mixture import Mixture


@st.composite
def mixtures(draw):
    names = draw(st.lists(st.text("abcde", min_size=1, max_size=2), min_size=1, max_size=4, unique=True))
    rows = {name: draw(st.integers(1, 40)) for name in names}
    weights = {name: draw(st.sampled_from([0.1, 0.5, 1.0, 3.0])) for name in names}
    return Mixture(draw(st.integers(0, 99)), rows, weights), rows, weights


@given(mixtures(), st.integers(0, 5000), st.integers(0, 300), st.integers(0, 300))
def test_choices_are_the_same_wherever_the_reading_began(made, start, skipped, count):
    mixture, _, _ = made
    whole = mixture.choices(start, skipped + count)
    assert (mixture.choices(start + skipped, count) == whole[skipped:]).all()
    drawn = mixture.counts(start, skipped + count)
    assert drawn == {name: int((whole == i).sum()) for i, name in enumerate(mixture.names)}


def test_sources_are_drawn_by_their_weights():
    weights = {"a": 1.0, "b": 2.0, "c": 5.0}
    mixture = Mixture(3, dict.fromkeys(weights, 10), weights)
    counts = mixture.counts(12_345, 80_000)
    for name, weight in weights.items():
        assert counts[name] == pytest.approx(10_000 * weight, rel=0.03)
    choices = mixture.choices(0, 80_000)
    after_c = choices[1:][choices[:-1] == mixture.names.index("c")]
    assert (after_c == mixture.names.index("c")).mean() == pytest.approx(5 / 8, abs=0.02)  # and independently


@given(mixtures(), st.integers(1, 3))
def test_an_epoch_is_one_pass_of_the_largest_source_by_weight(made, epochs):
    mixture, rows, weights = made
    assert mixture.leader in weights
    assert all((weights[mixture.leader], rows[mixture.leader]) >= (weights[name], rows[name]) for name in mixture.names)
    end = mixture.epoch_end(epochs - 1)
    assert mixture.counts(0, end)[mixture.leader] == epochs * rows[mixture.leader]
    assert mixture.counts(0, end - 1)[mixture.leader] == epochs * rows[mixture.leader] - 1
    halfway = end // 2
    assert mixture.epoch_end(epochs - 1, halfway, mixture.counts(0, halfway)[mixture.leader]) == end


def test_an_epoch_longer_than_what_is_looked_at_together(monkeypatch):
    rows, weights = {"a": 5000, "b": 10}, {"a": 1.0, "b": 0.5}
    whole = Mixture(1, rows, weights)
    end, counts = whole.epoch_end(1), whole.counts(17, 9000)
    monkeypatch.setattr(module, "_CHUNK", 64)
    assert Mixture(1, rows, weights).epoch_end(1) == end
    assert Mixture(1, rows, weights).counts(17, 9000) == counts


def test_how_often_each_source_is_passed_over():
    mixture = Mixture(0, {"large": 30_000, "small": 1_000}, {"large": 3.0, "small": 1.0})
    assert mixture.repeats() == {"large": pytest.approx(1.0), "small": pytest.approx(10.0)}
    end = mixture.epoch_end(0)
    assert mixture.counts(0, end)["small"] / 1_000 == pytest.approx(10.0, rel=0.05)


def test_the_order_in_which_sources_are_named_does_not_matter():
    one = Mixture(0, {"a": 5, "b": 7}, {"a": 1.0, "b": 2.0})
    two = Mixture(0, {"b": 7, "a": 5}, {"b": 2.0, "a": 1.0})
    assert one.names == two.names
    assert (one.choices(0, 100) == two.choices(0, 100)).all()


def test_a_mixture_needs_rows_and_weights_above_zero():
    with pytest.raises(ValueError, match="a weight each"):
        Mixture(0, {"a": 1}, {"b": 1.0})
    with pytest.raises(ValueError, match="'a' needs a weight and rows"):
        Mixture(0, {"a": 0}, {"a": 1.0})
