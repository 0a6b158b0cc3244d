"""Alarms follow from readings of all ranks: spikes, stragglers and growth are found, and health is not."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from postlude.manifest.alarms import MIB, rules_for
from postlude.telemetry import readings
from postlude.telemetry.alarms import Watch
from postlude.telemetry.readings import Reading, measures, note_engine, note_step, read

GROWTH = 12
"""Readings that the rule for growth looks at."""
STEP = {"seconds": 1.0, "seconds_forward": 0.3, "seconds_data_wait": 0.01}


def reading(resident_mib: float = 1000.0, **seconds: float) -> Reading:
    return Reading(step=1, resident_bytes=int(resident_mib * MIB), seconds={**STEP, **seconds})


def found(rounds: list[dict[int, Reading]]) -> list[str]:
    watch = Watch(rule for rule in rules_for(None, "sft") if rule.of_workers)
    changes = [change for each in rounds for change in watch.take_all(measures(each))]
    assert all(change.timed for change in changes)
    return [change.what for change in changes if change.kind == "alarm"]


@given(st.lists(st.lists(st.floats(900, 1100), min_size=3, max_size=3), min_size=1, max_size=30))
def test_a_healthy_group_has_no_alarm(sizes):
    assert found([{rank: reading(size) for rank, size in enumerate(each)} for each in sizes]) == []


@given(st.integers(0, 3), st.floats(1.8, 20))
def test_a_spike_on_one_rank_is_told_once(rank, times):
    rounds = [{number: reading() for number in range(4)} for _ in range(6)]
    for each in rounds[4:]:
        each[rank] = reading(1000 * times)
    assert found(rounds) == [f"memory spike, rank {rank}"]


def test_what_all_ranks_do_at_once_is_no_spike_of_one():
    rounds = [{rank: reading() for rank in range(3)} for _ in range(4)]
    assert found([*rounds, {rank: reading(5000) for rank in range(3)}]) == []


@given(st.integers(0, 2), st.sampled_from(["seconds_forward", "seconds_data_wait"]))
def test_a_rank_that_the_others_wait_for_is_told_once(rank, phase):
    slow = {number: reading(**({phase: 0.9} if number == rank else {})) for number in range(3)}
    assert found([slow] * 6) == [f"straggler, rank {rank}"]


def test_what_the_step_does_not_feel_makes_no_straggler():
    short = {"seconds_forward": 0.01}
    assert found([{0: reading(**short), 1: reading(seconds_forward=0.09), 2: reading(**short)}] * 6) == []


def test_one_slow_step_makes_no_straggler():
    healthy = {number: reading() for number in range(3)}
    slow = {**healthy, 1: reading(seconds_forward=0.9)}
    assert found([healthy, slow, healthy, slow, slow, healthy]) == []


def test_memory_that_grows_with_each_reading_is_told():
    grows = [{0: reading(1000 + 60 * number)} for number in range(GROWTH + 3)]
    assert found(grows) == ["growth of host memory, rank 0"]
    assert found(grows[: GROWTH - 1]) == []
    pauses = [{0: reading(1000 + 60 * (number - number % 3))} for number in range(GROWTH + 3)]
    assert found(pauses) == []


def test_a_process_reads_itself():
    readings._lines.clear()
    note_step({"step": 7, "seconds": 2.0, "seconds_forward": 0.5, "loss": 1.0})
    note_step({"step": 8, "seconds": 4.0, "seconds_forward": 0.5, "seconds_data_wait": 1.0})
    now = read()
    assert now.step == 8
    assert now.seconds == {"seconds": 3.0, "seconds_forward": 0.5, "seconds_data_wait": 0.5}
    assert now.resident_bytes > 10 * MIB
    assert "device_bytes" not in now.to_json()


def test_what_engines_answered_adds_up():
    readings._engines.clear()
    assert "engines" not in read().to_json()
    note_engine("native 0", 3, requests=8, tokens=90, seconds=1.5)
    note_engine("native 1", 3, requests=1, tokens=2, seconds=0.5)
    earlier = read()
    note_engine("native 0", 4, requests=2, tokens=10, seconds=0.5)
    assert read().engines == {
        "native 0": {"version": 4, "requests": 10, "tokens": 100, "seconds": 2.0},
        "native 1": {"version": 3, "requests": 1, "tokens": 2, "seconds": 0.5},
    }
    assert earlier.engines["native 0"]["tokens"] == 90
    readings._engines.clear()
