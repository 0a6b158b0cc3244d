"""Recorded changes to a running stage: asked for from outside, applied at a named step, replayed by a resume.

The stage's journal holds requests (``id``, ``assignment``) and, for each, the step from which it holds
(``applied``, ``from_step``), written before the step runs. A resume that goes back behind that step applies the
change again at the same step, so the run is the same as if it had never been disturbed.
"""

from __future__ import annotations

from postlude.runs import Stage


class Amendments:
    """The amendments of one stage, read on the leading rank."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._size = -1
        self._requests: dict[int, str] = {}
        self._from_step: dict[int, int] = {}

    def due(self, step: int) -> list[str]:
        """The assignments that take effect with this step, in the order they were asked for.

        A request that has no step yet is given this one, durably, before it is returned.
        """
        self._read()
        for number in self._requests.keys() - self._from_step.keys():
            self._stage.amendments.append({"applied": number, "from_step": step}, sync=True)
            self._from_step[number] = step
        return [self._requests[n] for n in sorted(self._requests) if self._from_step[n] == step]

    def before(self, step: int) -> list[str]:
        """The assignments already in effect before this step: what a resume starts with."""
        self._read()
        return [self._requests[n] for n in sorted(self._requests) if self._from_step.get(n, step) < step]

    def _read(self) -> None:
        size = self._stage.amendments.size_bytes()
        if size == self._size:
            return
        self._size = size
        self._requests, self._from_step = self._stage.read_amendments()
