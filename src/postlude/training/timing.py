"""Seconds by phase: where the time of a step goes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from postlude.telemetry.pulse import beat


class Phases:
    """A stopwatch for each phase of a step: data_wait, forward, backward, optimizer, checkpoint, evaluate.

    On CUDA the work of a phase is awaited before the watch is read only if ``synchronize`` is set, which costs
    overlap; without it a phase shows the time until its work was queued. Each phase is a beat of the process's pulse.
    """

    def __init__(self, synchronize: bool = False) -> None:
        self.synchronize = synchronize
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        beat(phase)
        begin = time.perf_counter()
        try:
            yield
        finally:
            if self.synchronize and torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - begin

    def add(self, seconds: Mapping[str, float]) -> None:
        """Count what was measured elsewhere."""
        for phase, spent in seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + spent

    def take(self) -> dict[str, float]:
        """The seconds since the last call, by phase."""
        taken, self.seconds = self.seconds, {}
        return taken
