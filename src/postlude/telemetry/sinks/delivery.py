"""How one sink is told of one stage: in a thread of its own, from where it was before.

What is still to be told stands in the run directory, so nothing waits in memory, and a sink that hangs or a tracker
that is away costs the run nothing. How far a sink was told is noted in the run, after it has said that it has it all.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

from postlude import storage
from postlude.runs import Run
from postlude.secrecy import is_secret_key, kept
from postlude.telemetry import events
from postlude.telemetry.sinks.sink import OpenSink, Sink, artifact_of

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 60.0
"""Between two attempts where a sink fails: twice as long each time."""
FLUSH_LINES = 200
"""A sink is flushed after so many lines, and when there are no more."""


@dataclass(frozen=True)
class News:
    """What the events of a run say of a stage."""

    happened: Sequence[events.Event] = ()
    """Since its present revision began."""
    committed: int | None = 0
    """The last step that no resume can take back; None where that is true of all."""
    done: bool = False
    starts: Sequence[tuple[int, float]] = ()
    """After how many steps each life of the stage began, and when, in seconds since 1970."""

    def began(self, step: int) -> tuple[int, float]:
        """When the life of the stage began that made this step."""
        return next((start for start in reversed(self.starts) if start[0] < step), (0, 0.0))


def news_of(happened: Sequence[events.Event], trains: bool) -> News:
    """What follows from the events of one stage. A stage that does not train takes no portion back."""
    committed, done, starts = 0, False, []
    for event in happened:
        match event:
            case events.StageStarted():
                committed, done = max(committed, event.from_step), False
                starts.append((event.from_step, event.moment))
            case events.CheckpointSaved():
                committed = max(committed, event.step)
            case events.StageFinished() | events.StageTakenOver():
                done = True
    return News(happened, None if done or not trains else committed, done, starts)


@dataclass
class Cursor:
    """How far a sink was told of a stage."""

    step: int = 0
    events: int = 0
    readings: int = 0
    complete: bool = False
    """Whether it knows of the artifact, after which there is nothing more."""


class Delivery:
    """Tells one sink of one revision of a stage, until it is closed or all is told."""

    def __init__(self, run_uri: str, stage: str, revision: int, name: str, sink: Sink) -> None:
        self.run, self.name, self.sink = Run(run_uri), name, sink
        self.stage = self.run.stage(stage)
        self._place = storage.join(run_uri, "sinks", f"{place_of(name, sink)}", f"{stage}-{revision}.json")
        self._cursor = self._read_cursor()
        self._opened: OpenSink | None = None
        self._news, self._sent, self._events, self._readings, self._clock = News(), 0, 0, 0, _Clock()
        self._turn, self._closing = threading.Condition(), False
        self._looks, self._looked = 0, 0
        self.at_work_since: float | None = None
        """When the sink was given what it is at work on, by the monotonic clock."""
        self.failed: str | None = None
        """Why it could not be told at last; None when it was."""
        self._alarmed = False
        self._thread = threading.Thread(target=self._work, name=f"sink {name}", daemon=True)
        self._thread.start()

    def tell(self, news: News) -> None:
        """Let it be known that there may be something to tell."""
        with self._turn:
            self._news, self._looks = news, self._looks + 1
            self._turn.notify()

    def close(self) -> None:
        """Tell what is left, once, and end; in the background."""
        with self._turn:
            self._closing = True
            self._turn.notify()

    def join(self, seconds: float) -> None:
        """Wait for the end so long."""
        self._thread.join(seconds)

    def untold(self) -> int:
        """How many steps that stand it does not have for sure."""
        if self._cursor.complete:
            return 0
        last = self.stage.metrics.last()
        standing = last["step"] if last else 0
        if self._news.committed is not None:
            standing = min(standing, self._news.committed)
        return max(0, standing - self._cursor.step)

    # --- in the thread --------------------------------------------------------------------------------------

    def _work(self) -> None:
        pause, over = FIRST_PAUSE_SECONDS, False
        while not over:
            with self._turn:
                self._turn.wait_for(lambda: self._closing or self._looks > self._looked)
                self._looked, over = self._looks, self._closing
            self.at_work_since = time.monotonic()
            try:
                self._deliver()
                self.failed, pause = None, FIRST_PAUSE_SECONDS
                if self._cursor.complete:
                    self._close()
                self.at_work_since = None
            except Exception as error:  # somebody else's code and service: whatever it raises, the run goes on
                self.at_work_since = None
                self._fail(error)
                with self._turn:
                    self._turn.wait_for(lambda: self._closing, pause)
                    self._looked = -1  # there is something to tell
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
        self._close()

    def _deliver(self) -> None:
        news, cursor = self._news, self._cursor
        if cursor.complete and cursor.events >= len(news.happened):
            return
        if self._opened is None:
            self._opened, self._events = self.sink.open(self.run.uri, self.stage.name), cursor.events
            self._worker_reader, self._readings = storage.Reader(self.stage.readings), cursor.readings
            self._begin(self._opened, cursor.step, news)
        opened = self._opened
        for event in news.happened[self._events :]:
            opened.event(event)
            self._events += 1
        self._tell_readings(opened)
        waiting = 0
        for line in self._lines(opened, news):
            try:
                opened.metrics(line)
            except Exception:
                self._note(opened, news)  # what came before is there
                raise
            self._sent, waiting = line["step"], waiting + 1
            if waiting >= FLUSH_LINES:
                self._note(opened, news)
                waiting = 0
        if news.done and not self._cursor.complete and (artifact := artifact_of(self.run.uri, self.stage.name)):
            opened.artifact(artifact)
            self._note(opened, news, complete=True)
        else:
            self._note(opened, news)

    def _begin(self, opened: OpenSink, after: int, news: News) -> None:
        """Have the sink go on behind a step."""
        self._sent = opened.begin(after)
        self._reader, self._clock = storage.Reader(self.stage.metrics), _Clock()
        if opened.goes_back:  # then it has forgotten what was said of later steps, too
            for event in news.happened[: self._events]:
                if (getattr(event, "step", None) or 0) > after:
                    opened.event(event)

    def _lines(self, opened: OpenSink, news: News) -> Iterator[Mapping[str, Any]]:
        """The lines that are to be told, each with its time."""
        standing = None if opened.goes_back else news.committed
        if self._cursor.complete or (standing is not None and standing <= self._sent):
            return
        journal = self.stage.metrics
        for part in self._reader.parts():
            if not part.content and part.first < self._sent and opened.goes_back:
                self._begin(opened, part.first, news)
                yield from self._lines(opened, news)
                return
            before = self._clock.copy()
            for line in journal.entries(part.place, part.number, part.content):
                if standing is not None and line["step"] > standing:
                    self._clock = before  # the part comes again
                    return
                at = self._clock.after(line, news)
                if line["step"] > self._sent:
                    yield {**line, "time": at}

    def _tell_readings(self, opened: OpenSink) -> None:
        """What was read of the workers: it is never cut, and goes on through resumes."""
        if type(opened).reading is OpenSink.reading:
            return
        journal = self.stage.readings
        for part in self._worker_reader.parts():
            lines = journal.entries(part.place, part.number, part.content)
            for line in lines[max(0, self._readings - part.first) :]:
                opened.reading({**line, "moment": datetime.fromisoformat(line["time"]).timestamp()})
            self._readings = max(self._readings, part.first + len(lines))

    def _note(self, opened: OpenSink, news: News, complete: bool = False) -> None:
        """Write down how far the sink is, once it says that it has it."""
        opened.flush()
        step = self._sent if news.committed is None else min(self._sent, news.committed)
        now = Cursor(max(step, 0), self._events, self._readings, complete or self._cursor.complete)
        if now != self._cursor:
            self._cursor = now
            storage.write_document(self._place, asdict(now))

    def _read_cursor(self) -> Cursor:
        try:
            return Cursor(**storage.read_document(self._place))
        except (storage.NotFound, storage.CorruptError, TypeError):
            return Cursor()

    def _fail(self, error: Exception) -> None:
        self.failed = f"{type(error).__name__}: {error}"
        if not self._alarmed:
            self._alarmed = True
            traceback.print_exception(error)
            self.alarm(f"sink '{self.name}' fails", f"{self.failed}. It is told the rest when it works again")
        self._close()

    def alarm(self, what: str, reason: str) -> None:
        """Let a person know, where the run itself can be written."""
        with suppress(storage.StorageError, OSError):
            events.record(self.run.events, "alarm", self.stage.name, what=what, reason=reason)

    def _close(self) -> None:
        opened, self._opened = self._opened, None
        if opened is not None:
            try:
                opened.close()
            except Exception as error:
                traceback.print_exception(error)


@dataclass
class _Clock:
    """When steps were made: their seconds, added to when the stage was taken up. So it is the same whenever it is asked
    for."""

    start: tuple[int, float] = (-1, 0.0)
    elapsed: float = field(default=0.0)

    def copy(self) -> _Clock:
        return _Clock(self.start, self.elapsed)

    def after(self, line: Mapping[str, Any], news: News) -> float:
        """The end of the step that a line tells of, in seconds since 1970."""
        if (start := news.began(line["step"])) != self.start:
            self.start, self.elapsed = start, 0.0
        self.elapsed += line.get("seconds") or 0.0
        return self.start[1] + self.elapsed


def place_of(name: str, sink: Sink) -> str:
    """A name of a sink that follows from what the manifest says of it, without secrets."""
    keys = {key: value for key, value in sink.model_dump(mode="json").items() if not is_secret_key(key)}
    said = json.dumps(kept(keys), sort_keys=True)
    return f"{name.replace(' ', '-')}-{hashlib.sha256(said.encode()).hexdigest()[:8]}"
