"""The one mouth of a stage: metrics, losses and events go to the run directory, from where others take them, and to the
terminal."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from postlude.runs import Account, Run
from postlude.storage import CorruptError
from postlude.telemetry import events
from postlude.telemetry.alarms import RulesByStep, StageWatch
from postlude.telemetry.progress import Display
from postlude.telemetry.pulse import beat
from postlude.telemetry.readings import note_step


class Recorder:
    """Takes what one rank tells. The leading rank's metrics and events are kept; losses by example are every rank's.

    Events may come from any thread. ``alarms`` tells the rules that hold for the metrics, as they were amended.
    """

    def __init__(
        self,
        run: Run,
        stage: str,
        rank: int = 0,
        display: Display | None = None,
        alarms: Callable[[], RulesByStep] | None = None,
    ) -> None:
        self._run, self._stage, self._leads = run, run.stage(stage), rank == 0
        self._examples = self._stage.examples_writer(rank)
        self._display = display
        self._turn = threading.RLock()
        self._account: Account | None = None
        self._rules = alarms
        self._watch: StageWatch | None = None

    def metrics(self, line: Mapping[str, Any]) -> None:
        """One line for each optimiser step."""
        beat("metrics")
        note_step(line)
        if not self._leads:
            return
        with self._turn:
            self._stage.metrics.append(line)
            if self._display:
                self._display.update(line)
            if self._rules:
                self._judge(line, self._rules)

    def preparing(self, what: str, share: float) -> None:
        """How far the stage is with something that comes before its first step: for the terminal alone."""
        beat(what)
        if self._display:
            self._display.preparing(what, share)

    def examples(self, step: int, epoch: int, rows: Sequence[tuple[str, str, float, int]]) -> None:
        """This rank's losses by example: (example id, source, summed loss, tokens it runs over) each."""
        self._examples.write(step, epoch, rows)

    def rollouts(self, step: int, lines: Sequence[Mapping[str, Any]]) -> None:
        """What a policy answered, told with the step that trains on it."""
        if self._leads and lines:
            with self._turn:
                for line in lines:
                    self._stage.rollouts.append({"step": step, **line})

    def event(self, kind: str, **fields: Any) -> None:
        """Something that happened in the stage; ``fields`` are the kind's in :mod:`postlude.telemetry.events`."""
        if not self._leads:
            return
        with self._turn:
            event = events.record(self._run.events, kind, self._stage.name, **fields)
            if self._display:
                self._display.event(event)
            if kind == "amendment_applied" and self._rules and self._watch:
                self._watch.hold_to(self._rules())

    def flush(self) -> None:
        """Return when all of the above is on the disk."""
        self._examples.flush()
        if self._leads:
            with self._turn:
                self._stage.metrics.flush()
                self._stage.rollouts.flush()
                self._run.events.flush()

    def begin_account(self, examples: int) -> None:
        """Note what stands in the stage, on the leading rank: so many losses by example among it."""
        self._account = Account(self._stage, self._run.events, examples)

    @property
    def examples_told(self) -> int:
        """How many losses by example this rank has told."""
        return self._examples.told

    def account(self, examples: int) -> dict[str, Any]:
        """What a checkpoint of this moment stands for, when all is flushed: so many losses by example, of all ranks."""
        with self._turn:
            return self._account.take(examples) if self._account else {}

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()

    def _judge(self, line: Mapping[str, Any], rules: Callable[[], RulesByStep]) -> None:
        """Tell the alarms that follow from a line; with the first one, from all that stand there already."""
        lines: Iterable[Mapping[str, Any]] = [line]
        if self._watch is None:
            happened: list[events.Event] = []
            with suppress(CorruptError):  # better an alarm twice than no run
                happened = events.read(self._run.events)
            self._watch = StageWatch(rules(), self._stage.name, happened)
            lines = self._stage.metrics
        for each in lines:
            for kind, fields in self._watch.take(each):
                self.event(kind, **fields)
