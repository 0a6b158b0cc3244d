"""What a tracker refuses is told in one way, and no two metrics become one."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postlude.telemetry.sinks import mlflow, trackio
from postlude.telemetry.sinks.vocabulary import Vocabulary

LETTERS = st.text(st.sampled_from("ab@+/.-u40_ %é\N{GREEK SMALL LETTER ALPHA}"), min_size=1, max_size=12)


def mlflows() -> Vocabulary:
    return Vocabulary(mlflow.REFUSED, finite=True)


@given(st.lists(LETTERS, unique=True, min_size=2, max_size=30))
def test_two_names_never_become_one(names: list[str]) -> None:
    vocabulary = mlflows()
    assert len({vocabulary.name(name) for name in names}) == len(names)


@given(LETTERS)
def test_mlflow_takes_what_comes_out(name: str) -> None:
    validation = pytest.importorskip("mlflow.utils.validation")
    validation._validate_metric_name(mlflows().name(name))


def test_names_as_they_are_told() -> None:
    name = mlflows().name
    assert name("pass@4") == "pass-u40-4"
    assert name("eval_held-out_loss") == "eval_held-out_loss"
    assert name("reward/format a") == "reward/format a"
    assert name("/a//b/..") == "-u2f-a/-u2f-b/-u2e--u2e-"
    assert name("a-u40-b") == "a-u2d-u40-b"
    assert Vocabulary().name("pass@4") == "pass@4"
    assert Vocabulary(reserved=trackio.RESERVED).name("time") == "metric-u2f-time"


def test_a_long_name_is_cut_and_stays_its_own() -> None:
    vocabulary = Vocabulary(longest=40)
    first, second = vocabulary.name("a" * 50), vocabulary.name("a" * 51)
    assert first != second
    assert len(first) == len(second) == 40
    assert re.fullmatch("a{30}-[0-9a-f]{9}", first)


def test_a_number_that_is_not_finite_is_told_beside() -> None:
    vocabulary = mlflows()
    told = [
        vocabulary.numbers({"step": step, "time": 1.0, "loss": loss, "skipped": True, "mfu": None, "why": "text"})
        for step, loss in enumerate((1.5, math.nan, math.inf, -math.inf, 2.0))
    ]
    assert told == [
        {"loss": 1.5, "skipped": 1},
        {"loss.not_finite": 1, "skipped": 1},
        {"loss.not_finite": 2, "skipped": 1},
        {"loss.not_finite": 3, "skipped": 1},
        {"loss": 2.0, "loss.not_finite": 0, "skipped": 1},
    ]
    assert Vocabulary().numbers({"step": 1, "loss": math.inf}) == {"loss": math.inf}
