"""Meters of a step: rates, the share of the machine's peak that the model made use of, memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from postlude.data.batch import PackedBatch
from postlude.telemetry import hardware
from postlude.training.precision import Precision
from postlude.training.workers import Workers


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
