"""Doing the work of a stage: portion by portion, each committed, shared by the ranks, gone on with after a stop.

A portion is a file of JSON lines that is there whole or not at all. Its line of metrics follows from it, so a
resume writes those that a kill cut off. Ranks take turns in rounds: after each the lead tells how far it is.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from postlude import storage
from postlude.data.records import record_json
from postlude.errors import DataError
from postlude.stages.work import Entry, Work
from postlude.stages.workbench import Workbench
from postlude.storage import exact_json
from postlude.telemetry.recorder import Recorder


class Portions:
    """The portions of a stage's work, in a folder of its directory."""

    def __init__(self, bench: Workbench, work: Work) -> None:
        self._bench, self._work = bench, work
        self._folder = storage.join(bench.stage.uri, "portions")

    def do_all(self, recorder: Recorder, stop: Callable[[], bool]) -> int | None:
        """Do what is missing, on every rank; how many portions there are, or None if asked to stop before the end.

        DataError if the data changed since the stage began.
        """
        workers, count = self._bench.workers, self._work.portions
        told = 0
        if workers.leads:
            self._hold_to_plan()
            told = self._bench.stage.metrics.cut(lambda line: line["step"] <= count)
        workers.barrier()
        done = {int(name.partition(".")[0]) for name in storage.list_directory(self._folder) if name[0].isdigit()}
        done = set(workers.from_lead(done))
        recorder.event("stage_started", from_step=next(n for n in range(count + 1) if n not in done))
        for first in range(0, count, workers.world):
            if workers.sum_numbers({"stop": float(stop())})["stop"]:
                return None
            own = first + workers.rank
            begin = time.monotonic()
            if own < count and own not in done:
                self._write(own, self._work.do(own))
            seconds = dict(workers.gather((own, time.monotonic() - begin)))
            if workers.leads:
                for portion in range(max(first, told), min(first + workers.world, count)):
                    recorder.metrics(self._line(portion, seconds[portion]))
        recorder.flush()
        return count

    def read(self) -> Iterator[list[Entry]]:
        """What the portions gave, in order, one at a time in memory."""
        for portion in range(self._work.portions):
            yield self._read(portion)

    def remove(self) -> None:
        """Remove the portions, once the artifact holds what they gave."""
        storage.remove(self._folder)

    def _line(self, portion: int, seconds: float) -> dict[str, Any]:
        measured = dict(self._work.measure(self._read(portion)))
        rate = {"tokens_per_second": measured["tokens"] / seconds} if measured.get("tokens") and seconds else {}
        progress = (portion + 1) / self._work.portions
        return {"step": portion + 1, "progress": progress, **measured, "seconds": seconds, **rate}

    def _uri(self, portion: int) -> str:
        return storage.join(self._folder, f"{portion:08d}.jsonl")

    def _write(self, portion: int, entries: Sequence[Entry]) -> None:
        # Not the exact JSON of metrics: that takes a text such as "NaN" for a number, and a model may well say it.
        storage.write_text(self._uri(portion), "".join(record_json(entry) + "\n" for entry in entries))

    def _read(self, portion: int) -> list[Entry]:
        return [json.loads(line) for line in storage.read_text(self._uri(portion)).splitlines()]

    def _hold_to_plan(self) -> None:
        """Write down what the portions are made of, or refuse to mix them with others."""
        uri = storage.join(self._folder, "plan.json")
        plan: dict[str, Any] = {"portions": self._work.portions, "data": dict(self._work.reads)}
        if not storage.exists(uri):
            storage.write_text(uri, exact_json.dump(plan))
            return
        before = exact_json.load(storage.read_text(uri))
        if before != plan:
            changed = [name for name, fingerprint in plan["data"].items() if before["data"].get(name) != fingerprint]
            raise DataError(
                f"The data of the stage '{self._bench.task.stage}' changed since it began: {', '.join(changed)}. Put "
                "them back as they were, or give the run another name."
            )
