"""Writes docs/status.md from the tests: a pytest plugin.

A test that carries ``capability("...")`` proves what it names. One that needs a GPU leaves its capability
written but not run. What is absent is listed here with the key that the manifest refuses, and a test holds
that it does refuse it. After a whole session without a failure the page is written anew.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "status.md"

ABSENT = {
    "A policy that workers hold together answers by itself, without an external engine": "stages.rl.parallel.tensor=2",
}
"""What the design names and the project does not do yet, with an override that must be refused."""


class Status:
    """Collects what each capability rests on, and writes the page when every test was run or deselected by mark."""

    def __init__(self) -> None:
        self.tests: dict[str, set[str]] = defaultdict(set)
        self.needs_gpu: dict[str, set[str]] = defaultdict(set)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """A process at the tests (``-n``) has ended: each has collected all of them."""
        self.tests, self.needs_gpu = getattr(node, "workeroutput", {}).get("capabilities", (self.tests, self.needs_gpu))

    @pytest.hookimpl(tryfirst=True)  # before marks deselect any
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            for mark in item.iter_markers("capability"):
                where = self.needs_gpu if item.get_closest_marker("gpu") else self.tests
                where[mark.args[0]].add(item.nodeid.split("[")[0])

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        config = session.config
        if hasattr(config, "workeroutput"):  # one of several processes at the tests: the one that leads them writes
            config.workeroutput["capabilities"] = [dict(self.tests), dict(self.needs_gpu)]
            return
        partial = config.option.keyword or config.args_source.name != "TESTPATHS"
        if exitstatus != pytest.ExitCode.OK or partial:
            return
        page = self.render()
        if not PAGE.exists() or PAGE.read_text() != page:
            PAGE.write_text(page)
            print("\ndocs/status.md was written anew: commit it.")

    def render(self) -> str:
        lines = [
            "# Status",
            "",
            "Written by the tests (`tests/status.py`); not edited by hand.",
            "",
            "## Proven",
            "",
            "| capability | proven by |",
            "| --- | --- |",
        ]
        lines += [
            f"| {name} | {', '.join(f'`{test}`' for test in sorted(tests))} |"
            for name, tests in sorted(self.tests.items())
        ]
        lines += ["", "## Written, not run on the machines that test this project", ""]
        lines += ["| capability | needs | tests |", "| --- | --- | --- |"]
        lines += [
            f"| {name} | a CUDA device | {', '.join(f'`{test}`' for test in sorted(tests))} |"
            for name, tests in sorted(self.needs_gpu.items())
        ]
        lines += ["", "## Absent: refused by the manifest", "", "| capability | refused |", "| --- | --- |"]
        lines += [f"| {name} | `{override}` |" for name, override in ABSENT.items()]
        return "\n".join(lines) + "\n"


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Status(), "capabilities")
