"""A sink is told each step once, and of events and artifacts, whatever goes back, fails or hangs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from patience import until
from postlude import storage
from postlude.runs import Run
from postlude.telemetry import events
from postlude.telemetry.sinks import delivery
from postlude.telemetry.sinks.process import Follower, Order
from postlude.telemetry.sinks.sink import Artifact, OpenSink, Sink


class Book:
    """What a tracker was told, over all lives of a sink."""

    def __init__(self) -> None:
        self.lines: list[Mapping[str, Any]] = []
        self.events: list[str] = []
        self.artifacts: list[Artifact] = []
        self.readings: list[tuple[int, int, float]] = []
        self.begun: list[int] = []
        self.closed = 0
        self.fails: Callable[[int], bool] = lambda step: False
        self.hangs = threading.Event()
        self.hangs.set()

    @property
    def steps(self) -> list[int]:
        return [line["step"] for line in self.lines]


class Writes(Sink):
    """Writes into a book."""

    book: int
    goes_back: bool = False

    def open(self, run_uri: str, stage: str) -> OpenSink:
        return (GoesBack if self.goes_back else Opened)(BOOKS[self.book])


class Opened(OpenSink):
    def __init__(self, book: Book) -> None:
        self.book = book

    def begin(self, after: int) -> int:
        self.book.begun.append(after)
        return after

    def metrics(self, line: Mapping[str, Any]) -> None:
        self.book.hangs.wait()
        if self.book.fails(line["step"]):
            raise ConnectionError("the tracker is gone")
        self.book.lines.append(line)

    def event(self, event: events.Event) -> None:
        self.book.events.append(event.kind)

    def reading(self, line: Mapping[str, Any]) -> None:
        self.book.readings.append((line["rank"], line["step"], line["moment"]))

    def artifact(self, artifact: Artifact) -> None:
        self.book.artifacts.append(artifact)

    def close(self) -> None:
        self.book.closed += 1


class GoesBack(Opened):
    goes_back = True

    def begin(self, after: int) -> int:
        self.book.lines = [line for line in self.book.lines if line["step"] <= after]
        return super().begin(after)


BOOKS: dict[int, Book] = {}


class Told:
    """A run, and sinks that are told of it as the process of the sinks does it."""

    def __init__(self, run: Run) -> None:
        self.run, self.sft = run, run.stage("sft")
        self.book = BOOKS[1] = Book()
        self.live = BOOKS[2] = Book()
        self.begin()

    def begin(self, trains: bool = True, seconds: float = 10.0) -> None:
        sinks = {"book": Writes(book=1), "live": Writes(book=2, goes_back=True)}
        self.follower = Follower(Order(self.run.uri, 0, sinks, {"sft": trains}, None, {}, None, seconds))

    def event(self, kind: str, **fields: Any) -> None:
        events.record(self.run.events, kind, "sft", **fields)

    def steps(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            self.sft.metrics.append({"step": step, "loss": 0.5 * step, "seconds": 2.0})

    def end(self) -> None:
        self.follower.look()
        self.follower.close()

    def dropped(self) -> list[tuple[str, int]]:
        told = events.read(self.run.events)
        return [(event.sink, event.count) for event in told if isinstance(event, events.StepsDropped)]


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Told:
    monkeypatch.setattr(delivery, "FIRST_PAUSE_SECONDS", 0.01)
    return Told(Run(str(tmp_path / "run")))


def test_a_sink_gets_what_a_checkpoint_stands_for_and_one_that_goes_back_all(told: Told) -> None:
    told.event("stage_started", from_step=0)
    told.steps(1, 7)
    told.event("checkpoint_saved", step=5, uri="x")
    told.end()
    assert told.book.steps == [1, 2, 3, 4, 5]
    assert told.live.steps == [1, 2, 3, 4, 5, 6, 7]
    assert told.dropped() == []
    told.sft.metrics.cut(lambda line: line["step"] <= 5)
    told.begin()
    told.event("stage_started", from_step=5)
    told.steps(6, 9)
    told.event("stage_finished", steps=9)
    told.end()
    stands = told.sft.metrics.read()
    for book in (told.book, told.live):
        assert [{**line, "time": None} for line in book.lines] == [{**line, "time": None} for line in stands]
        assert book.closed == 2
    assert told.book.events == ["stage_started", "checkpoint_saved", "stage_started", "stage_finished"]
    starts = [event.moment for event in events.read(told.run.events) if isinstance(event, events.StageStarted)]
    times = [line["time"] for line in told.book.lines]
    assert times == [starts[0] + 2.0 * n for n in range(1, 6)] + [starts[1] + 2.0 * n for n in range(1, 5)]


def test_a_stage_that_goes_back_while_the_sinks_are_at_work(told: Told) -> None:
    told.event("stage_started", from_step=0)
    told.steps(1, 4)
    told.event("checkpoint_saved", step=2, uri="x")
    told.follower.look()
    until(lambda: told.live.steps == [1, 2, 3, 4] and told.book.steps == [1, 2])
    told.sft.metrics.cut(lambda line: line["step"] <= 2)
    told.event("stage_started", from_step=2)
    told.sft.metrics.append({"step": 3, "loss": 7.0})
    told.follower.look()
    until(lambda: told.live.steps == [1, 2, 3])
    told.steps(4, 5)
    told.event("stage_finished", steps=5)
    told.end()
    assert told.live.steps == told.book.steps == [1, 2, 3, 4, 5]
    assert told.live.lines[2]["loss"] == told.book.lines[2]["loss"] == 7.0
    assert len(told.live.begun) == 2
    assert told.live.begun[-1] <= 2


@pytest.mark.capability("A failing tracker does not stop the run, and gets the rest when it works again")
def test_a_sink_that_fails_is_told_the_rest_later_and_alarmed_once(
    told: Told, capsys: pytest.CaptureFixture[str]
) -> None:
    failures = iter([True, True, True])
    told.book.fails = lambda step: step == 3 and next(failures, False)
    told.event("stage_started", from_step=0)
    told.steps(1, 6)
    told.event("stage_finished", steps=6)
    told.follower.look()
    until(lambda: 6 in told.book.steps)
    told.end()
    assert told.book.steps == told.live.steps == [1, 2, 3, 4, 5, 6]
    assert told.dropped() == []
    (alarm,) = [event for event in events.read(told.run.events) if isinstance(event, events.Alarm)]
    assert "book" in alarm.what
    assert "ConnectionError: the tracker is gone" in alarm.reason
    assert capsys.readouterr().err.count("Traceback") == 1


@pytest.mark.capability("What a tracker that hangs or is away was not told is counted, and told when the run goes on")
def test_what_a_sink_did_not_take_is_counted_and_comes_with_the_next_life(told: Told) -> None:
    told.begin(seconds=0.2)
    told.book.hangs.clear()
    told.live.fails = lambda step: step > 2
    told.event("stage_started", from_step=0)
    told.steps(1, 6)
    told.event("stage_finished", steps=6)
    told.end()
    assert sorted(told.dropped()) == [("book", 6), ("live", 4)]
    hung, told.book = told.book, BOOKS[1]
    BOOKS[1] = told.book = Book()
    told.live.fails = lambda step: False
    told.begin()
    told.end()
    hung.hangs.set()
    assert told.book.steps == told.live.steps == [1, 2, 3, 4, 5, 6]
    assert len(told.dropped()) == 2


def test_readings_of_workers_are_told_once_through_lives(told: Told) -> None:
    told.event("stage_started", from_step=0)
    for life in range(2):
        for rank in range(2):
            reading = {"time": f"1970-01-01T00:0{life}:00.000+00:00", "rank": rank, "host": "a", "step": 3}
            told.sft.readings.append({**reading, "round_trip_seconds": 0.5, "resident_bytes": 7})
        told.begin()
        told.end()
    assert told.book.readings == [(0, 3, 0.0), (1, 3, 0.0), (0, 3, 60.0), (1, 3, 60.0)]


def test_the_artifact_is_told_once_and_then_nothing_is_opened(told: Told) -> None:
    told.event("stage_started", from_step=0)
    told.steps(1, 2)
    with told.sft.write_artifact() as folder:
        storage.write_text(storage.join(folder, "lineage.json"), '{"parents": []}\n')
    told.event("stage_finished", steps=2)
    told.end()
    told.begin()
    told.end()
    (artifact,) = told.book.artifacts
    assert (artifact.uri, artifact.lineage) == (told.sft.artifact, {"parents": []})
    assert told.book.begun == [0]


def test_a_stage_that_does_not_train_takes_nothing_back(told: Told) -> None:
    told.begin(trains=False)
    told.event("stage_started", from_step=0)
    told.steps(1, 3)
    told.end()
    assert told.book.steps == [1, 2, 3]


def test_a_new_revision_is_told_from_its_begin(told: Told) -> None:
    told.event("stage_started", from_step=0)
    told.steps(1, 3)
    told.event("stage_finished", steps=3)
    told.follower.look()
    until(lambda: told.book.steps == [1, 2, 3])
    told.sft.metrics.cut(lambda line: False)
    told.event("stage_set_aside", revision=1)
    told.event("stage_started", from_step=0)
    told.steps(1, 2)
    told.event("stage_finished", steps=2)
    told.end()
    assert told.book.steps == [1, 2, 3, 1, 2]


def test_a_sink_with_other_settings_is_another_but_not_with_another_token() -> None:
    class Tracker(Writes):
        token: str = ""

    first = delivery.place_of("tracker", Tracker(book=1))
    assert delivery.place_of("tracker", Tracker(book=1, token="abcdef-secret")) == first
    assert delivery.place_of("tracker", Tracker(book=3)) != first
