"""What is drawn of curves and marks: exact values, one mark for what happened, and no text that could act."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dashboard.conftest import make_steps, new_run
from postlude.dashboard.charts import MARKS_SHOWN, Line, Mark, chart, graph, grouped, marks_of, others, thinned
from postlude.dashboard.followed import Followed
from postlude.runs import Run
from postlude.runs.columns import Curve, thin
from postlude.telemetry import events

EVIL = [":formatter", "<img src=x onerror=alert(1)>", "</script><script>alert(1)</script>", "{b}{c}", "\u2028"]


def curve(values: list[float]) -> Curve:
    return thin(np.arange(1, len(values) + 1), np.array(values), 100, 1, len(values))


def parts(document: Any) -> Iterator[tuple[str, Any]]:
    """Every key in an option, with what stands under it."""
    if isinstance(document, dict):
        for key, value in document.items():
            yield key, value
            yield from parts(value)
    elif isinstance(document, list):
        for value in document:
            yield from parts(value)


def test_values_are_those_that_were_told() -> None:
    values = [0.1, 1e-300, 3.0, float("nan"), 7.25]
    series = chart("Loss", [Line("loss", curve(values))], [], 1, 5)["series"]
    assert series[0]["data"] == [[1, 0.1], [2, 1e-300], [3, 3.0], [5, 7.25]]
    assert series[1]["data"] == [[4, 1e-300]]
    assert chart("Memory, MiB", [Line("m", curve([2.0**30]))], [], 1, 1)["series"][0]["data"] == [[1, 1024.0]]
    logged = chart("Loss", [Line("loss", curve([0.0, -1.0, 2.0]))], [], 1, 3, log=True)
    assert logged["yAxis"]["type"] == "log"
    assert logged["series"][0]["data"] == [[3, 2.0]]


@given(st.lists(st.text(), min_size=1, max_size=3), st.text())
def test_no_text_of_a_run_is_a_key_and_no_option_a_program(names: list[str], text: str) -> None:
    for told in [*names, *EVIL]:
        lines = [Line(name, curve([1.0, 2.0]), curve([1.0, 1.5])) for name in [*names, told]]
        options = chart(told, lines, [Mark(1, "alarm", text)], 1, 2)
        drawn = graph({told: ("running", []), "next": ("pending", [told, "gone"])})
        fixed = chart("", [Line("a", curve([1.0, 2.0]), curve([1.0, 1.5]))], [Mark(1, "alarm", "")], 1, 2)
        known = {key for key, _ in parts(fixed)} | {key for key, _ in parts(graph({"a": ("", []), "b": ("", ["a"])}))}
        for key, value in [*parts(options), *parts(drawn)]:
            assert key in known
            assert not key.startswith(":")
            assert key != "renderMode" or value == "richText"


def test_what_happened_stands_at_its_step(run: Run) -> None:
    events.record(run.events, "stage_started", "sft")
    events.record(run.events, "checkpoint_saved", "sft", step=4, uri="x")
    events.record(run.events, "amendment_applied", "sft", step=6, assignment="optimizer.lr=1e-5")
    events.record(run.events, "alarm", "sft", what="loss spike", reason="loss is 9", step=7, rule="loss spike")
    events.record(run.events, "alarm", "more", what="of another stage", reason="x", step=7)
    events.record(run.events, "worker_failure", "sft", what="process", reason="killed by signal 9")
    events.record(run.events, "stage_started", "sft", from_step=4)
    marks = marks_of(events.read(run.events), "sft")
    assert [(mark.step, mark.kind) for mark in marks] == [
        (4, "checkpoint"),
        (6, "amendment"),
        (7, "alarm"),
        (4, "fault"),
    ]
    assert marks[-1].text == "process failure: killed by signal 9; went on after step 4"
    events.record(run.events, "stage_set_aside", "sft", revision=1)
    assert marks_of(events.read(run.events), "sft") == []


def test_many_marks_are_thinned_and_the_rare_ones_stay() -> None:
    marks = [Mark(step, "checkpoint", f"{step}") for step in range(1, 100_001)] + [Mark(77_777, "fault", "it")]
    shown = thinned(marks, 1, 100_000)
    assert len(shown) <= MARKS_SHOWN + 1
    assert shown[-1] == Mark(77_777, "fault", "it")
    assert "999 more" in shown[0].text
    assert [mark.step for mark in thinned(marks, 500, 520)] == list(range(500, 521))


def test_every_metric_has_its_place() -> None:
    names = ["loss", "eval_a_loss", "lr", "grad_norm", "grad_norm_critic", "entropy", "tokens_per_second"]
    groups = {title: found for title, found, _ in grouped(names)}
    assert groups["Gradient norm"] == ["grad_norm", "grad_norm_critic"]
    assert groups["Held-out"] == ["eval_a_loss"]
    assert groups["MFU"] == []
    assert others(names) == ["entropy"]
    assert sorted([*others(names), *(name for found in groups.values() for name in found)]) == sorted(names)
    assert all(why for _, _, why in grouped([]))


def test_a_curve_has_at_most_two_values_a_column_and_shows_a_spike_at_every_zoom(tmp_path: Any) -> None:
    run = new_run(tmp_path)
    make_steps(run, range(1, 3001))
    run.stage("sft").metrics.append({"step": 3001, "loss": 99.0})
    make_steps(run, range(3002, 4001))
    followed = Followed(run)
    for first, last in ((1, 4000), (2000, 4000), (3001, 3003)):
        found = followed.curve("sft", "loss", 50, first, last)
        assert len(found.steps) <= 100
        assert 99.0 in found.values
