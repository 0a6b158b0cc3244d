"""Rules say at which values an alarm begins and is over, and a repeated stretch of a stage tells nothing twice."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postlude.manifest.alarms import AlarmRule, rules_for
from postlude.telemetry import events
from postlude.telemetry.alarms import StageWatch, Watch, left_behind, standing

NOW = "2026-01-01T00:00:00Z"


def changes(values: Iterable[float], metric: str = "x", **rule: Any) -> list[tuple[str, int]]:
    """What a rule makes of a series, each change with the place of the value it came with."""
    watch = Watch([AlarmRule.model_validate({"metric": metric, **rule})])
    return [
        (change.kind, place)
        for place, value in enumerate(values)
        for change in watch.take({"step": place, metric: value})
    ]


def noise(count: int, mean: float = 2.0, deviation: float = 0.1) -> list[float]:
    draw = random.Random(0)
    return [draw.gauss(mean, deviation) for _ in range(count)]


# --- kinds ----------------------------------------------------------------------------------------------------


def test_a_threshold_has_two_levels_and_is_armed_again() -> None:
    rule = {"above": 10.0, "for": 2, "quiet": 3}
    values = [9, 11, 9, 11, 12, 11, 9.5, 9.5, 9.5, 8, 8, 9.5, 8, 8, 8, 11, 11]
    assert changes(values, **rule) == [("alarm", 4), ("alarm_over", 14), ("alarm", 16)]
    assert changes([-value for value in values], below=-10.0, **{"for": 2, "quiet": 3}) == changes(values, **rule)


def test_a_deviation_is_counted_in_those_of_its_own_past() -> None:
    values = noise(60)
    assert changes([*values, 2.75], deviates=6.0) == [("alarm", 60)]
    assert changes([*values, 2.4], deviates=6.0) == []
    assert changes([*values, 1.25], deviates=6.0) == [("alarm", 60)]
    assert changes([*values, 1.25], deviates=6.0, direction="up") == []
    assert changes([*values, 2.75], deviates=6.0, least=1.0) == []
    assert changes([*values[:19], 9.0], deviates=6.0) == [], "too little is known"
    assert changes([2.0] * 60 + [2.1], deviates=6.0) == [], "what never varied says nothing of how far"


def test_multiples_are_of_the_median() -> None:
    assert changes([1.0] * 30 + [2.9, 3.1], rises=3.0) == [("alarm", 31)]
    assert changes([1.0] * 30 + [0.6, 0.4], falls=0.5) == [("alarm", 31)]
    assert changes([0.0] * 30 + [0.4], rises=3.0) == [], "of nothing there is no multiple"
    assert changes([1.0] * 30 + [5.0] * 100, rises=3.0, quiet=5) == [("alarm", 30), ("alarm_over", 59)], (
        "what lasts becomes usual"
    )


def test_what_gets_no_better_stalls() -> None:
    falls = [5.0 - 0.01 * step for step in range(50)]
    assert changes(falls, stalls=10) == []
    assert changes([*falls, *[4.6] * 20, 1.0, 0.9], stalls=10, quiet=2) == [("alarm", 59), ("alarm_over", 71)]
    assert changes(falls, stalls=10, better="higher") == [("alarm", 10)]
    assert changes(falls, stalls=10, least=0.2) == [("alarm", 10)]


def test_a_climb_has_no_step_down() -> None:
    climbs = [1.0 + 0.1 * step for step in range(8)]
    assert changes(climbs, climbs=1.4, over=6) == [("alarm", 5)]
    assert changes([*climbs[:4], 1.0, *climbs[4:]], climbs=1.4, over=6) == []
    assert changes(climbs, climbs=2.5, over=6) == []


@given(st.sampled_from([math.nan, math.inf, -math.inf]))
def test_what_is_not_finite_is_a_case_for_its_own_rule(value: float) -> None:
    values = [*noise(40), value, 2.0]
    assert changes(values, not_finite=True, quiet=1) == [("alarm", 40), ("alarm_over", 41)]
    for kind in ({"deviates": 6.0}, {"rises": 3.0}, {"stalls": 100}, {"climbs": 1.0, "over": 3}):
        assert changes(values, **kind) == changes([*values[:40], 2.0], **kind)


@given(st.lists(st.floats(), max_size=80), st.sampled_from(["above", "deviates", "rises", "stalls", "not_finite"]))
def test_an_alarm_begins_and_is_over_in_turn(values: list[float], kind: str) -> None:
    limit: dict[str, Any] = {"stalls": 3, "not_finite": True}
    kinds = [change for change, _ in changes(values, **{kind: limit.get(kind, 1.5), "after": 3, "quiet": 2})]
    assert kinds == (["alarm", "alarm_over"] * len(kinds))[: len(kinds)]


def test_each_metric_and_each_worker_has_its_own_alarm() -> None:
    watch = Watch([AlarmRule(name="spike", metric="worker_*", rises=2.0, after=3, over=5)])
    for _ in range(4):
        assert watch.take_all({rank: {"worker_a": 1.0, "worker_b": 1.0} for rank in range(3)}) == []
    found = watch.take_all({0: {"worker_a": 3.0, "worker_b": 1.0}, 1: {"worker_a": 1.0, "worker_b": 9.0}, 2: {}})
    assert [change.what for change in found] == ["spike, worker_a, rank 0", "spike, worker_b, rank 1"]
    assert watch.take_all({rank: {"worker_b": 9.0} for rank in range(3)}) == [], "what all do is no fault of one"


@pytest.mark.parametrize(
    ("rule", "values", "reason"),
    [
        ({"metric": "kl", "above": 0.5}, [0.75], "kl is 0.75, above 0.5"),
        ({"metric": "loss", "not_finite": True}, [math.nan], "loss is nan"),
        ({"metric": "x_bytes", "rises": 2.0}, [2.0**30] * 20 + [2.0**32], "x_bytes is 4,096 MiB, usually 1,024 MiB"),
        ({"metric": "reward", "stalls": 2, "better": "higher"}, [3, 1, 2], "reward is 2; the best was 3, 2 values ago"),
        ({"metric": "x", "climbs": 1.5, "over": 3}, [1, 2, 3], "x is 3, and grew with each of 3 values from 1"),
    ],
)
def test_an_alarm_says_what_is_and_what_should_be(rule: dict[str, Any], values: list[float], reason: str) -> None:
    watch = Watch([AlarmRule.model_validate(rule)])
    told = [change.reason for value in values for change in watch.take({rule["metric"]: value})]
    assert told == [reason]


# --- default rules --------------------------------------------------------------------------------------------


def planted(step: int) -> dict[str, Any]:
    """A healthy line of a stage."""
    draw = random.Random(step)
    return {
        "step": step,
        "loss": 3.0 * 0.999**step + draw.gauss(0, 0.05),
        "grad_norm": math.exp(draw.gauss(0, 0.4)),
        "update_ratio": 0.002 * math.exp(draw.gauss(0, 0.2)),
        "tokens": 1000,
        "trained_tokens": 500 + draw.randrange(100),
        "tokens_per_second": 5000.0 * draw.uniform(0.8, 1.2),
        "skipped": False,
        "mfu": None,
    }


def default_alarms(change: Any, steps: int = 300) -> list[tuple[str, str, int]]:
    watch = Watch(rules_for(None, "sft"))
    return [
        (found.kind, found.what, step)
        for step in range(1, steps + 1)
        for found in watch.take(planted(step) | (change(step) or {}))
    ]


def test_a_healthy_stage_has_no_alarm() -> None:
    assert default_alarms(lambda step: None, steps=1500) == []


@pytest.mark.capability("Alarms by rules of the manifest, with defaults: at the right steps, once")
@pytest.mark.parametrize(
    ("change", "first"),
    [
        (lambda step: {"loss": 9.0} if step == 120 else None, ("loss spike", 120)),
        (lambda step: {"loss": math.nan} if step == 120 else None, ("not finite, loss", 120)),
        (lambda step: {"eval_held_loss": math.inf} if step == 40 else None, ("not finite, eval_held_loss", 40)),
        (lambda step: {"grad_norm": 80.0} if step == 120 else None, ("gradient spike, grad_norm", 120)),
        (lambda step: {"update_ratio": 0.04} if step == 120 else None, ("update spike, update_ratio", 120)),
        (lambda step: {"grad_norm": math.inf} if step >= 7 else None, ("gradient not finite, grad_norm", 10)),
        (lambda step: {"trained_tokens": 100} if step > 100 else None, ("trained share fallen", 105)),
        (lambda step: {"tokens_per_second": 100.0} if step > 200 else None, ("throughput fallen", 250)),
        (lambda step: {"entropy": 1.0 if step < 50 else 0.0}, ("entropy collapse", 54)),
        (lambda step: {"groups_alike": float(step > 60)}, ("groups all alike", 80)),
        (lambda step: {"kl": 0.01 * step}, ("far from the reference", 55)),
        (
            lambda step: {"engine_gap": 0.001 * step, "engine_gap_explained": 0.1},
            ("the engine is not the policy", 101),
        ),
    ],
)
def test_what_is_planted_is_told_at_its_step(change: Any, first: tuple[str, int]) -> None:
    begun = [(what, step) for kind, what, step in default_alarms(change) if kind == "alarm"]
    assert begun == [first]


def test_no_progress_is_told_of_the_loss_or_else_of_the_reward() -> None:
    still = {"loss": 2.0}
    assert default_alarms(lambda step: still, 2101) == [("alarm", "no progress", 2100)]
    reward = {**still, "groups_alike": 0.5, "reward": 0.3}
    assert default_alarms(lambda step: reward, 2101) == [("alarm", "no progress of the reward", 550)]


# --- a stage that goes back -----------------------------------------------------------------------------------

SPIKES = [AlarmRule(name="spike", metric="x", above=5.0, quiet=2), AlarmRule(name="slow", metric="seconds", above=5.0)]


def live(lines: Iterable[dict[str, Any]], happened: list[events.Event], stage: str = "sft") -> None:
    """Go through a stage's lines, adding to the events."""
    watch = StageWatch({0: SPIKES}, stage, happened)
    for line in lines:
        for kind, fields in watch.take(line):
            known = {"alarm": events.Alarm, "alarm_over": events.AlarmOver}
            happened.append(known[kind](time=NOW, kind=kind, stage=stage, **fields))


def spiking(*spikes: int, steps: int = 20) -> list[dict[str, Any]]:
    return [{"step": step, "x": 9.0 if step in spikes else 1.0, "seconds": 9.0} for step in range(1, steps + 1)]


def of_rule(happened: list[events.Event]) -> list[tuple[str, int | None]]:
    return [
        (event.kind, event.step)
        for event in happened
        if isinstance(event, events.Alarm | events.AlarmOver) and event.rule == "spike"
    ]


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=4))
def test_a_replay_tells_the_same_alarms_at_the_same_steps_once(lives: list[tuple[int, int]]) -> None:
    lines, undisturbed, happened = spiking(3, 4, 9, 17), [], []
    live(lines, undisturbed)
    for _, killed in lives:  # each goes on from lines that stand there, and shows the rules all of them
        live(lines[:killed], happened)
    live(lines, happened)
    assert sorted(of_rule(happened), key=str) == sorted(of_rule(undisturbed), key=str)
    steps = [3, 6, 9, 11, 17, 19]
    assert of_rule(undisturbed) == list(zip(["alarm", "alarm_over"] * 3, steps, strict=True))


def test_what_does_not_come_again_is_taken_back_and_may_come_yet_again() -> None:
    happened: list[events.Event] = []
    live(spiking(19), happened)
    live(spiking(20), happened)
    assert of_rule(happened) == [("alarm", 19), ("alarm_over", 19), ("alarm", 20)]
    live(spiking(19), happened)
    assert of_rule(happened)[3:] == [("alarm", 19), ("alarm_over", 20)]


def test_a_stage_that_is_begun_anew_tells_its_alarms_anew() -> None:
    happened: list[events.Event] = []
    live(spiking(19), happened)
    live(spiking(19), happened, stage="dpo")
    happened.append(events.StageSetAside(time=NOW, kind="stage_set_aside", stage="sft", revision=1))
    assert [each.alarm.stage for each in standing(happened)] == ["dpo", "dpo"]
    live(spiking(19), happened)
    assert of_rule(happened) == [("alarm", 19)] * 3


def test_alarms_of_times_are_told_apart() -> None:
    happened: list[events.Event] = []
    live(spiking(3), happened)
    assert {event.rule for event in happened if getattr(event, "timed", None)} == {"slow"}


# --- what stands ----------------------------------------------------------------------------------------------


def test_an_alarm_stands_until_it_is_over_and_acknowledged() -> None:
    alarm = events.Alarm(time=NOW, kind="alarm", stage="sft", what="spike", reason="", rule="spike", step=3)
    only_happened = events.Alarm(time=NOW, kind="alarm", what="manifest lock written anew", reason="")
    over = events.AlarmOver(time=NOW, kind="alarm_over", stage="sft", what="spike", reason="", rule="spike", step=9)
    known = events.AlarmAcknowledged(time=NOW, kind="alarm_acknowledged", stage="sft", what="spike")
    (one, other) = standing([alarm, only_happened])
    assert (one.over, one.acknowledged, other.alarm) == (None, False, only_happened)
    assert [each.over for each in standing([alarm, over])] == [over]
    assert [each.acknowledged for each in standing([alarm, known])] == [True]
    assert standing([alarm, known, over]) == standing([alarm, over, known]) == []
    assert [each.acknowledged for each in standing([alarm, known, over, alarm])] == [False], "it is armed again"
    assert standing([only_happened, events.AlarmAcknowledged(time=NOW, kind="x", what=only_happened.what)]) == []


def test_what_nobody_looks_at_any_more_is_over() -> None:
    kept, removed, leak = ({"time": NOW, "stage": "sft", "what": name, "reason": "", "rule": name} for name in "abc")
    happened = [events.Alarm.model_validate({"kind": "alarm", **each}) for each in (kept, removed, leak)]
    rules = [AlarmRule(name="a", metric="x", above=1.0), AlarmRule(name="c", metric="worker_behind", above=1.0)]
    assert [(kind, fields["what"]) for kind, fields in left_behind(rules, "sft", happened)] == [
        ("alarm_over", "b"),
        ("alarm_over", "c"),
    ]
    assert list(left_behind(rules, "other", happened)) == []
