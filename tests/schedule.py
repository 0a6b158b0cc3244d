"""Which process runs which tests, and in which order: a pytest plugin, for several processes at the tests (``-n``).

Tests of one file share fixtures, so they stay together. The files that take longest come first: whatever is begun last
is short then, and no process is left alone with a long one. How long tests take is no promise but a reading, of those
that take a while; a test that was never read counts as one of its kind. ``pytest --record-seconds`` reads anew.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

READINGS = Path(__file__).with_name("seconds.json")

KEPT_SECONDS = 8.0
"""A test that takes less is not worth a line."""

USUAL_SECONDS = {True: 20.0, False: 0.2}
"""Of a test without a reading, one that is marked ``long`` and another."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-seconds", action="store_true", help=f"write {READINGS.name} anew from this session")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class LongestFileFirst(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return file_of(nodeid)

        def _reschedule(self, node: Any) -> None:
            """Give a process no file before it needs one: while the next test of its own waits, others may be free."""
            if not self.workqueue or self._pending_of(self.assigned_work[node]) < 2:
                super()._reschedule(node)

    config.option.loadscopereorder = False  # not by their number, but as they were collected
    return LongestFileFirst(config, log)


def file_of(nodeid: str) -> str:
    return nodeid.split("::", 1)[0]


@pytest.hookimpl(trylast=True)  # after marks have deselected some
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not hasattr(config, "workerinput"):
        return
    known, seconds = read(), Counter[str]()
    for item in items:
        usual = USUAL_SECONDS[item.get_closest_marker("long") is not None]
        seconds[file_of(item.nodeid)] += known.get(item.nodeid, usual)
    items.sort(key=lambda item: seconds[file_of(item.nodeid)], reverse=True)


def read() -> dict[str, float]:
    """How long tests took that took a while, by their ids."""
    return json.loads(READINGS.read_text()) if READINGS.exists() else {}


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not config.option.record_seconds:
        return
    seconds = Counter[str]()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.nodeid] += report.duration
    kept = {name: known for name, known in read().items() if name not in seconds}
    kept |= {name: round(taken) for name, taken in seconds.items() if taken >= KEPT_SECONDS}
    READINGS.write_text(json.dumps(dict(sorted(kept.items())), indent=0) + "\n")
