"""A sink of a user's own: one line of text for each step."""

from __future__ import annotations

from pathlib import Path

from postlude.telemetry.sinks.sink import OpenSink, Sink


class Lines(Sink):
    """Writes the stage and the step of every metrics line to a file."""

    path: str

    def open(self, run_uri: str, stage: str) -> OpenSink:
        return _Lines(Path(self.path), stage)


class _Lines(OpenSink):
    def __init__(self, path: Path, stage: str) -> None:
        self.path, self.stage = path, stage

    def metrics(self, line) -> None:
        with self.path.open("a") as file:
            file.write(f"{self.stage} {line['step']}\n")
