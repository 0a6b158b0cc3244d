"""A sink at which stages meet: each waits in its first step until the others have started, or raises."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from postlude.manifest.component import register
from postlude.runs import Run
from postlude.telemetry.sinks.sink import OpenSink, Sink

DEADLINE_SECONDS = 600.0


@register("sinks", "meeting")
class Meeting(Sink):
    """Brings stages together."""

    stages: list[str]

    def open(self, run_uri: str, stage: str) -> OpenSink:
        return _Waiting(Run(run_uri), stage, self.stages)


class _Waiting(OpenSink):
    def __init__(self, run: Run, stage: str, stages: list[str]) -> None:
        self._run, self._stages = run, stages if stage in stages else []

    def metrics(self, line: Mapping[str, Any]) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not self._all_started():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self._stages} did not meet")
            time.sleep(0.02)

    def _all_started(self) -> bool:
        started = {event["stage"] for event in self._run.events.read() if event["kind"] == "stage_started"}
        return set(self._stages) <= started
