"""Recorded changes to a running stage: asked for from outside, applied at a named step, replayed by a resume.

The stage's journal holds requests (:mod:`postlude.runs.requests`) and, for each, the step from which it holds, written
before the step runs. A resume that goes back behind that step applies the change again at the same step, so the run is
the same as if it had never been disturbed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from postlude.runs import Request, Requests, Stage


class Amendments:
    """What is asked of one stage, on the leading rank. A checkpoint may be told from any thread."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._size = -1
        self._requests = Requests()
        self._turn = threading.Lock()
        self._saving: dict[int, int] = {}
        """The requests for a checkpoint that were taken up, with the first step whose checkpoint answers."""

    def due(self, step: int, waits: Callable[[str], bool] = lambda assignment: False) -> list[str]:
        """The assignments that take effect with this step, in the order they were asked for.

        A request that has no step yet is given this one, durably, before it is returned; unless it, or one before it,
        ``waits`` for a later one.
        """
        for number, request in self._read().amendments.items():
            if request.from_step is None:
                if waits(request.assignment):
                    break
                self._write({"applied": number, "from_step": step})
        return [request.assignment for request in self._held() if request.from_step == step]

    def before(self, step: int) -> list[str]:
        """The assignments already in effect before this step: what a resume starts with."""
        return [each.assignment for each in self._held() if each.from_step is not None and each.from_step < step]

    def wants_checkpoint(self, step: int) -> bool:
        """Whether somebody has asked for a checkpoint since this was last asked, which one of this step answers."""
        asked = self._read().checkpoints.items()
        new = {number: step for number, answer in asked if answer is None and number not in self._saving}
        self._saving = {**self._saving, **new}
        return bool(new)

    def checkpointed(self, step: int) -> None:
        """Answer those who wait for a checkpoint of this step."""
        for number, first in self._saving.items():
            if first <= step and self._stage.requests().checkpoints[number] is None:
                self._write({"checkpointed": number, "step": step})

    def _held(self) -> list[Request]:
        return list(self._read().amendments.values())

    def _write(self, line: dict[str, int]) -> None:
        with self._turn:
            self._stage.amendments.append(line, sync=True)

    def _read(self) -> Requests:
        size = self._stage.amendments.size_bytes()
        if size != self._size:
            self._size, self._requests = size, self._stage.requests()
        return self._requests
