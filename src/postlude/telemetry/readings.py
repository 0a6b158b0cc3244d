"""Readings of a rank while it works, and the alarms that follow from those of all ranks."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

from postlude.telemetry import hardware

MIB = 2**20
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

    def to_json(self) -> dict[str, Any]:
        """As objects that JSON knows."""
        return {key: value for key, value in asdict(self).items() if value not in (None, {})}


_lock = threading.Lock()
_lines: deque[Mapping[str, Any]] = deque(maxlen=64)
"""Of the last steps: data come in windows of many, so one step says little of the wait for them."""
_link: dict[str, float] = {}


def note_step(line: Mapping[str, Any]) -> None:
    """Keep what this process measured of a step, for the next reading."""
    with _lock:
        _lines.append(line)


def note_link(**measured: float) -> None:
    """Keep what this process measured of its connections."""
    with _lock:
        _link.update(measured)


def read() -> Reading:
    """This process now."""
    with _lock:
        lines, link = list(_lines), dict(_link)
    cuda = hardware.cuda_in_use()
    return Reading(
        step=int(lines[-1].get("step", 0)) if lines else 0,
        resident_bytes=hardware.resident_bytes(),
        device_bytes=cuda.memory_allocated() if cuda else None,
        seconds={key: _mean(lines, key) for key in _KEPT if any(key in line for line in lines)},
        link=link,
    )


def _mean(lines: Sequence[Mapping[str, Any]], key: str) -> float:
    return sum(line.get(key, 0.0) for line in lines) / len(lines)


# --- alarms -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """Something about a rank that a person should look at."""

    what: str
    rank: int
    reason: str


SPIKE, SPIKE_BYTES = 1.5, 256 * MIB
"""So many times its usual memory, and so much more, is a spike of a rank whose peers have none."""
SLOW, SLOW_SHARE = 2.0, 0.1
"""So many times the others' time, and such a share of the step more, makes a straggler."""
GROWTH, GROWTH_BYTES, GROWTH_READINGS = 1.2, 256 * MIB, 12
"""So many readings, each above the one before, that end so much higher, are a leak."""
_USUAL = 3
"""Readings that make out what is usual."""


class Alarms:
    """Finds memory spikes of one rank, stragglers, and growing host memory, each once for a rank."""

    def __init__(self) -> None:
        self._past: dict[int, deque[Reading]] = {}
        self._reported: set[tuple[str, int]] = set()

    def look(self, readings: Mapping[int, Reading]) -> list[Finding]:
        """What is new in a reading of every rank."""
        findings = [*_spikes(readings, self._past), *_stragglers(readings, self._past)]
        for rank, reading in readings.items():
            self._past.setdefault(rank, deque(maxlen=GROWTH_READINGS)).append(reading)
        findings += _growths(self._past)
        new = [finding for finding in findings if (finding.what, finding.rank) not in self._reported]
        self._reported |= {(finding.what, finding.rank) for finding in new}
        return new


def _spikes(now: Mapping[int, Reading], past: Mapping[int, Sequence[Reading]]) -> list[Finding]:
    above = {}
    for rank, reading in now.items():
        before = past.get(rank, ())
        if len(before) >= _USUAL:
            usual = median(earlier.resident_bytes for earlier in before)
            if reading.resident_bytes > max(SPIKE * usual, usual + SPIKE_BYTES):
                above[rank] = reading.resident_bytes, usual
    if len(above) == len(now) > 1:  # what all do is no fault of one
        return []
    return [
        Finding("memory spike", rank, f"{size / MIB:,.0f} MiB of host memory, usually {usual / MIB:,.0f}")
        for rank, (size, usual) in above.items()
    ]


def _own_seconds(reading: Reading) -> float:
    """What a rank spent by itself: in the backward phase it waits for the others."""
    return reading.seconds.get("seconds_forward", 0.0) + reading.seconds.get("seconds_data_wait", 0.0)


def _stragglers(now: Mapping[int, Reading], past: Mapping[int, Sequence[Reading]]) -> list[Finding]:
    if len(now) < 2 or any(len(past.get(rank, ())) < _USUAL - 1 for rank in now):
        return []
    rounds = [now, *({rank: past[rank][-number] for rank in now} for number in range(1, _USUAL))]
    findings = []
    for rank in now:
        if all(_is_slow(each, rank) for each in rounds):
            others = median(_own_seconds(now[other]) for other in now if other != rank)
            own = f"{_own_seconds(now[rank]):.2f} s a step in forward and data"
            findings.append(Finding("straggler", rank, f"{own}, where the others take {others:.2f}"))
    return findings


def _is_slow(readings: Mapping[int, Reading], rank: int) -> bool:
    others = median(_own_seconds(reading) for other, reading in readings.items() if other != rank)
    own, step = _own_seconds(readings[rank]), readings[rank].seconds.get("seconds", 0.0)
    return step > 0 and own > SLOW * others and own - others > SLOW_SHARE * step


def _growths(past: Mapping[int, Sequence[Reading]]) -> list[Finding]:
    findings = []
    for rank, readings in past.items():
        sizes = [reading.resident_bytes for reading in readings]
        grows = len(sizes) == GROWTH_READINGS and all(a < b for a, b in pairwise(sizes))
        if grows and sizes[-1] > max(GROWTH * sizes[0], sizes[0] + GROWTH_BYTES):
            reason = f"from {sizes[0] / MIB:,.0f} to {sizes[-1] / MIB:,.0f} MiB, growing with each reading"
            findings.append(Finding("growth of host memory", rank, reason))
    return findings
