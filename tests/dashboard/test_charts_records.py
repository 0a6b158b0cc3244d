"""What is drawn of records, and that no text of theirs becomes markup."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from postlude.dashboard import charts_records
from postlude.dashboard.charts_records import COLOURINGS, Colouring
from postlude.runs import tokens
from postlude.runs.columns import Curve
from postlude.runs.losses import History, SourceLosses

MARKUP = '</span><script>alert("1")</script>'


def series(options: dict) -> dict[str, list]:
    json.dumps(options, allow_nan=False)  # as it is sent
    return {one["name"]: one["data"] for one in options["series"]}


def test_what_was_not_measured_is_a_gap_and_no_zero() -> None:
    bands = charts_records.bands({"worker 0": {"forward": 1.0, "rest": 0.5}, "worker 1": {"forward": 2.0}})
    assert series(bands) == {"forward": [1.0, 2.0], "wait and the rest": [0.5, None]}
    phases = {"forward": np.array([1.0, np.nan]), "optimizer": np.array([np.nan, np.nan])}
    told = charts_records.bands_over_time(np.array([5, 6]), phases)
    assert series(told) == {"forward": [[5, 1.0], [6, None]]}


def test_curves_have_the_values_that_were_told() -> None:
    curve = Curve(np.array([1, 4]), np.array([2.0**20, 2.0**21]), np.zeros(0, np.int64))
    assert series(charts_records.over_time("memory", {"worker 3": curve}, 2**20)) == {"worker 3": [[1, 1.0], [4, 2.0]]}
    source = SourceLosses(MARKUP, 1, 2, 0, 1, np.array([1, 3]), np.array([0.5, 0.25]))
    assert series(charts_records.by_source([source])) == {MARKUP: [[1, 0.5], [3, 0.25]]}
    one = np.array([1, 2])
    history = History("a:1", "a", one, one, np.array([0.5, np.inf]), one)
    assert series(charts_records.history(history)) == {"loss by token": [[1, 0.5], [2, None]]}
    fill = charts_records.fill(np.array([1]), np.array([96.0]), 128, "fill")
    assert series(fill) == {"fill": [[1, 0.75]]}
    assert fill["yAxis"]["min"] == 0


def sample(ratio: float, entropy: float = 1.0) -> tokens.Tokens:
    one = np.array([-1.0, -1.0])
    with np.errstate(divide="ignore"):
        trainer = one + np.log([1.0, ratio])
    line = tokens.told(["ask\n", MARKUP, "\x07"], [False, True, True], [3, 4], one, trainer, np.array([0.0, entropy]))
    told = tokens.Tokens.of(line)
    assert told is not None
    return told


@pytest.mark.parametrize("colouring", COLOURINGS)
def test_tokens_are_text_and_never_markup(colouring: Colouring) -> None:
    made = charts_records.tokens_html(sample(0.5), colouring)
    assert "<script" not in made
    assert "&lt;/span&gt;&lt;script&gt;" in made
    assert re.findall(r"<(?!/?span[ >])", made) == []
    assert made.count("<span") == made.count("</span>") == 3
    assert "\x07" not in made
    assert "ratio 0.5000, entropy 1.000, weights of step 4" in made


@pytest.mark.parametrize("ratio", [0.0, np.inf, np.nan])
def test_a_ratio_that_is_no_number_is_shown(ratio: float) -> None:
    assert charts_records.tokens_html(sample(ratio, np.nan), "ratio").count("background:#") == 2
    assert charts_records.tokens_html(sample(1.0, np.nan), "entropy").count("background:#") == 2


def test_colours_tell_tokens_apart() -> None:
    def colours(told: tokens.Tokens, colouring: Colouring) -> list[str]:
        return re.findall("background:(#[0-9a-f]+)", charts_records.tokens_html(told, colouring))

    same, likelier = colours(sample(1.5), "ratio")
    assert same.endswith("00")
    assert likelier.endswith("c8")
    assert colours(sample(1 / 1.5), "ratio")[1][:7] != likelier[:7]
    assert len(set(colours(sample(1.0), "version"))) == 2
    assert len(set(colours(sample(1.0), "mask"))) == 1


def test_the_mask_of_an_example_is_text_and_never_markup() -> None:
    told = [{"id": 5, "text": MARKUP, "trained": True}, {"id": 6, "text": "b", "trained": False}]
    made = charts_records.mask_html(told)
    assert "<script" not in made
    assert made.count("background:#") == 1
    assert 'title="5"' in made


def test_a_worker_that_is_behind_is_told() -> None:
    def reading(forward: float) -> dict:
        return {"step": 1, "resident_bytes": 1, "seconds": {"seconds": 2.0, "seconds_forward": forward}}

    behind = charts_records.behind({0: reading(0.5), 1: reading(1.5), 2: reading(0.5)})
    assert behind == {0: 0.0, 1: pytest.approx(3.0), 2: 0.0}
    assert charts_records.phases(reading(0.5)) == {"forward": 0.5, "rest": 1.5}
    assert charts_records.phases({"step": 1}) == {}
