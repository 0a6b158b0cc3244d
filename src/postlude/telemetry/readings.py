"""Readings of a rank while it works, and what alarms are made of in those of all ranks."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from postlude.telemetry import hardware

_KEPT = (
    "seconds",
    "seconds_data_wait",
    "seconds_forward",
    "seconds_backward",
    "seconds_optimizer",
    "seconds_checkpoint",
)


@dataclass(frozen=True)
class Reading:
    """One rank at one moment. What was not measured is None."""

    step: int
    resident_bytes: int
    """Memory of the machine that the process holds."""
    device_bytes: int | None = None
    """Memory of its GPU in use."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """By phase as in the metrics, ``seconds`` being the whole step: this rank's own mean over its last steps."""
    link: Mapping[str, float] = field(default_factory=dict)
    """Measured when the ranks met: ``collective_bytes_per_second``, ``rank_round_trip_seconds``, and on a GPU
    ``host_to_device_bytes_per_second`` and ``device_to_host_bytes_per_second``."""
    engines: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """What the engines that it asks have answered since it started, by name: ``requests``, ``tokens``, the ``seconds``
    that took, and the ``version`` of the weights that they have, in steps."""

    def to_json(self) -> dict[str, Any]:
        """As objects that JSON knows."""
        return {key: value for key, value in asdict(self).items() if value not in (None, {})}


_lock = threading.Lock()
_lines: deque[Mapping[str, Any]] = deque(maxlen=64)
"""Of the last steps: data come in windows of many, so one step says little of the wait for them."""
_link: dict[str, float] = {}
_engines: dict[str, dict[str, float]] = {}


def note_step(line: Mapping[str, Any]) -> None:
    """Keep what this process measured of a step, for the next reading."""
    with _lock:
        _lines.append(line)


def note_link(**measured: float) -> None:
    """Keep what this process measured of its connections."""
    with _lock:
        _link.update(measured)


def note_engine(name: str, version: int, requests: int, tokens: int, seconds: float) -> None:
    """Add what an engine has answered for this process, with weights of this version."""
    with _lock:
        before = _engines.get(name, {})
        added = {"requests": requests, "tokens": tokens, "seconds": seconds}
        _engines[name] = {"version": version, **{key: before.get(key, 0) + value for key, value in added.items()}}


def read() -> Reading:
    """This process now."""
    with _lock:
        lines, link, engines = list(_lines), dict(_link), dict(_engines)
    cuda = hardware.cuda_in_use()
    return Reading(
        step=int(lines[-1].get("step", 0)) if lines else 0,
        resident_bytes=hardware.resident_bytes(),
        device_bytes=cuda.memory_allocated() if cuda else None,
        seconds={key: _mean(lines, key) for key in _KEPT if any(key in line for line in lines)},
        link=link,
        engines=engines,
    )


def _mean(lines: Sequence[Mapping[str, Any]], key: str) -> float:
    return sum(line.get(key, 0.0) for line in lines) / len(lines)


# --- what alarms are made of --------------------------------------------------------------------------------

SLOW_SHARE = 0.1
"""A rank that needs no more than such a share of the step more than the others is not behind them."""


def measures(readings: Mapping[int, Reading]) -> dict[int | None, dict[str, float | None]]:
    """The metrics of each rank for alarms: ``worker_resident_bytes``, ``worker_device_bytes``, and ``worker_behind``,
    how many times it takes what the others take by themselves; 0 where the step does not feel it."""
    return {
        rank: {
            "worker_resident_bytes": reading.resident_bytes,
            "worker_device_bytes": reading.device_bytes,
            "worker_behind": _behind(readings, rank),
        }
        for rank, reading in readings.items()
    }


def _behind(readings: Mapping[int, Reading], rank: int) -> float | None:
    if len(readings) < 2:
        return None
    others = median(_own_seconds(reading) for other, reading in readings.items() if other != rank)
    own, step = _own_seconds(readings[rank]), readings[rank].seconds.get("seconds", 0.0)
    if own - others <= SLOW_SHARE * step or step <= 0:
        return 0.0
    return own / others if others else math.inf


def _own_seconds(reading: Reading) -> float:
    """What a rank spent by itself: in the backward phase it waits for the others."""
    return reading.seconds.get("seconds_forward", 0.0) + reading.seconds.get("seconds_data_wait", 0.0)
