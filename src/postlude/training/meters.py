"""Meters of a step: seconds by phase, rates, the share of the machine's peak that the model made use of, memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from postlude.data.batch import PackedBatch
from postlude.telemetry import hardware
from postlude.telemetry.pulse import beat
from postlude.training.precision import Precision
from postlude.training.workers import Workers


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


class Meters:
    """Turns what a step counted and how long it took into the rest of its metrics line.

    ``flops(batch)`` is what the architecture needs for one packed batch, forward and backward. Model FLOPs
    utilisation (Chowdhery et al., 2022) is that over the peak of all workers: measured on a CPU by a matrix
    product, the datasheet's on a GPU.
    """

    def __init__(
        self,
        flops: Callable[[PackedBatch], float] | None,
        workers: Workers,
        precision: Precision,
        threads: int,
    ) -> None:
        self.flops = flops or (lambda batch: 0.0)
        peak = hardware.peak_flops(workers.device, precision.dtype, threads) if flops else None
        self._peak_flops = peak * workers.world if peak else None

    def read(self, counts: Mapping[str, float], phases: Mapping[str, float], seconds: float) -> dict[str, float | None]:
        """The metrics of a step that took ``seconds``, of which ``phases`` tells the parts."""
        total = seconds + phases.get("data_wait", 0.0) + phases.get("checkpoint", 0.0)
        return {
            "tokens_per_second": counts["tokens"] / total,
            "mfu": counts["flops"] / (total * self._peak_flops) if self._peak_flops else None,
            "memory_bytes": hardware.memory_bytes(),
            "seconds": total,
            **{f"seconds_{phase}": spent for phase, spent in phases.items()},
        }
