"""Readings by rank are what their lines say; of many the extremes stay."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from postlude import storage
from postlude.runs import Run, workers
from postlude.runs.workers import PHASES, REST, Workers

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


def reading(rank: int, second: int, resident: int, **more: Any) -> dict[str, Any]:
    time = (BEGIN + timedelta(seconds=second)).isoformat(timespec="milliseconds")
    line = {"time": time, "rank": rank, "host": "h", "round_trip_seconds": 0.01, "step": second}
    return line | {"resident_bytes": resident, **more}


def milliseconds(second: int) -> int:
    return int(BEGIN.timestamp() * 1000) + second * 1000


def test_columns_are_what_the_lines_say(run: Run) -> None:
    journal = run.stage("sft").readings
    told = Workers(journal)
    assert not told.update()
    assert told.ranks == []
    seconds = {"seconds": 2.0, "seconds_forward": 0.5, "seconds_backward": 1.0}
    for line in (reading(1, 0, 10), reading(0, 1, 20, device_bytes=5), reading(1, 2, 30, seconds=seconds)):
        journal.append(line)
    journal.flush()
    assert told.update()
    assert not told.update()
    assert told.ranks == [0, 1]
    times, values = told.column(1, "resident_bytes")
    assert (times.tolist(), values.tolist()) == ([milliseconds(0), milliseconds(2)], [10.0, 30.0])
    # What was not measured is not zero.
    assert told.column(1, "device_bytes")[1].tolist() == []
    assert told.column(0, "device_bytes")[1].tolist() == [5.0]
    moments, bands = told.bands(1, 100)
    assert moments.tolist() == times.tolist()
    assert np.isnan(bands["forward"][0])
    assert np.isnan(bands[REST][0])
    assert [bands[name][1] for name in ("forward", "backward", REST)] == [0.5, 1.0, 0.5]
    assert np.isnan(bands["optimizer"][1])
    assert told.newest()[1]["resident_bytes"] == 30
    assert told.newest()[0]["host"] == "h"


def test_a_spike_stays_when_there_are_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "MOST_ROWS", 8)
    journal = storage.Journal(str(tmp_path / "readings.jsonl"), Run(str(tmp_path)).stage("a").readings.schema)
    told = Workers(journal)
    for second in range(100):
        seconds = {"seconds": float(second)} if second % 2 else {}
        journal.append(reading(0, second, 999 if second == 37 else second, seconds=seconds))
        told.update()
    times, values = told.column(0, "resident_bytes")
    assert len(values) <= 8
    assert values.max() == 999
    assert values[-1] == 99
    assert (np.diff(times) > 0).all()
    curve = told.curve(0, "resident_bytes", 4)
    assert curve.values.max() == 999
    assert curve.steps[-1] == milliseconds(99)
    _, bands = told.bands(0, 3)
    assert len(bands[REST]) <= 3
    assert all(np.isnan(bands[phase]).all() for phase in PHASES)


def test_a_damaged_line_is_told_and_the_rest_shown(run: Run, tmp_path: Path) -> None:
    journal = run.stage("sft").readings
    if not storage.has_path(run.uri):
        return
    for second in range(3):
        journal.append(reading(0, second, second))
    path = Path(journal.uri)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[1].replace('"resident_bytes": 1', '"resident_bytes": 7') + lines[2])
    told = Workers(journal)
    told.update()
    assert told.column(0, "resident_bytes")[1].tolist() == [0.0, 2.0]
    assert len(told.damages) == 1
    assert "line 2" in told.damages[0]


def test_a_journal_that_was_replaced_is_read_anew(tmp_path: Path) -> None:
    journal = Run(str(tmp_path)).stage("sft").readings
    told = Workers(journal)
    for second in range(3):
        journal.append(reading(0, second, second))
    told.update()
    journal.cut(lambda line: False)
    journal.append(reading(4, 9, 9))
    told.update()
    assert told.ranks == [4]
    assert told.column(4, "resident_bytes")[1].tolist() == [9.0]
