"""What was read of each worker while a stage ran: columns by rank, kept up with the journal of readings.

A run may be read for weeks, so of each rank so many rows are held at most: where there are more, two that follow one
another become one, with the greater memory and round trip, the mean of the times, and the later moment. A resume
repeats steps; what orders the readings is their time.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import numpy as np

from postlude import storage
from postlude.runs.columns import Curve, thin

MOST_ROWS = 2048
"""Of each rank."""

PHASES = ("data_wait", "forward", "backward", "optimizer", "checkpoint")
"""Of a step, as the readings name them after ``seconds_``."""
REST = "rest"
"""What of a step is none of these: where a rank waits for the others, and evaluates."""

_GREATEST = ("resident_bytes", "device_bytes", "round_trip_seconds")
_MEANS = ("seconds", *(f"seconds_{phase}" for phase in PHASES))
NUMBERS = ("step", *_GREATEST, *_MEANS)


class _Rows:
    """The readings of one rank: [rows, 1 + numbers], the first being the time in milliseconds since 1970."""

    def __init__(self) -> None:
        self.values = np.full((MOST_ROWS, 1 + len(NUMBERS)), np.nan)
        self.count = 0
        self.newest: Mapping[str, Any] = {}

    def add(self, time: float, reading: Mapping[str, Any]) -> None:
        if self.count == MOST_ROWS:
            self._halve()
        told = {**reading, **reading.get("seconds", {})} if isinstance(reading.get("seconds"), Mapping) else reading
        self.values[self.count] = [time, *(_number(told.get(name)) for name in NUMBERS)]
        self.count += 1
        self.newest = reading

    def _halve(self) -> None:
        earlier, later = self.values[0::2], self.values[1::2]
        halved = later.copy()
        for column, name in enumerate(NUMBERS, 1):
            one, two = earlier[:, column], later[:, column]
            if name in _GREATEST:
                halved[:, column] = np.fmax(one, two)
            elif name in _MEANS:
                halved[:, column] = np.where(np.isnan(one) | np.isnan(two), np.fmax(one, two), (one + two) / 2)
        self.count = len(halved)
        self.values[: self.count] = halved

    def column(self, name: str) -> np.ndarray:
        return self.values[: self.count, 1 + NUMBERS.index(name)]

    @property
    def times(self) -> np.ndarray:
        return self.values[: self.count, 0].astype(np.int64)


class Workers:
    """The readings of a stage's workers. :meth:`update` is called by one thread. Errors of reading are those of
    :class:`~postlude.storage.Journal`, but for lines that are damaged: these are told, and left out."""

    def __init__(self, readings: storage.Journal) -> None:
        self._journal = readings
        self._begin()

    def _begin(self) -> None:
        self._reader = storage.Reader(self._journal)
        self._ranks: dict[int, _Rows] = {}
        self._lines = 0
        self.damages: list[str] = []

    def update(self) -> bool:
        """Read what came since the last call. Whether anything did."""
        changed = False
        for part in self._reader.parts():
            changed = True
            if part.first < self._lines:  # never cut by a resume: somebody else has replaced it
                self._begin()
                return self.update()
            for number, line in enumerate(part.content.split(b"\n")[:-1], part.number):
                self._lines += 1
                try:
                    (reading,) = self._journal.entries(part.place, number, line + b"\n")
                    moment = datetime.fromisoformat(reading["time"]).timestamp() * 1000
                except (storage.CorruptError, ValueError) as error:
                    self.damages.append(str(error))
                else:
                    self._ranks.setdefault(reading["rank"], _Rows()).add(moment, reading)
        return changed

    @property
    def ranks(self) -> list[int]:
        return sorted(self._ranks)

    def newest(self) -> dict[int, Mapping[str, Any]]:
        """The newest reading of each rank, as its line says it."""
        return {rank: self._ranks[rank].newest for rank in self.ranks}

    def column(self, rank: int, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The moments at which a number of a rank was read, in milliseconds since 1970, int64, and its values."""
        rows = self._ranks[rank]
        values = rows.column(name)
        told = np.flatnonzero(~np.isnan(values))
        told = told[np.argsort(rows.times[told], kind="stable")]  # a clock may be put back
        return rows.times[told], values[told]

    def curve(self, rank: int, name: str, width: int) -> Curve:
        """A number of a rank in so many pixel columns, from the first reading of any to the last; its ``steps`` are
        milliseconds since 1970."""
        times, values = self.column(rank, name)
        first, last = self._ends()
        return thin(times, values, width, first, last)

    def bands(self, rank: int, width: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """How long each phase of a step took a rank, in at most so many columns: the moments, and of each phase and of
        :data:`REST` the seconds; NaN where it was not measured. In a column stands the mean."""
        rows = self._ranks[rank]
        times, whole = rows.times, rows.column("seconds")
        phases = {phase: rows.column(f"seconds_{phase}") for phase in PHASES}
        known = np.sum([np.nan_to_num(values) for values in phases.values()], axis=0)
        phases[REST] = np.maximum(whole - known, 0.0)
        starts = np.arange(0, len(times), -(-len(times) // width) or 1)
        return times[starts], {name: _means(values, starts) for name, values in phases.items()}

    def _ends(self) -> tuple[int, int]:
        times = [rows.times for rows in self._ranks.values()]
        return min((int(each[0]) for each in times), default=0), max((int(each[-1]) for each in times), default=0)


def _means(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Of the numbers from each start to the next; NaN where there are none."""
    told = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        means: np.ndarray = np.add.reduceat(np.where(told, values, 0.0), starts) / np.add.reduceat(told * 1, starts)
    return means


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else np.nan
