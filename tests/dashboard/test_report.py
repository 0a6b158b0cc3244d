"""A report is one file: nothing outside it is asked for, and no text of a run can end or begin anything in it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dashboard.conftest import make_steps, new_run
from postlude.dashboard import report as made
from postlude.dashboard.followed import Followed
from postlude.dashboard.report import echarts_script, report, safe_json, write_report
from postlude.errors import UserError
from postlude.runs import Run
from postlude.telemetry import events

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"


class Elements(HTMLParser):
    """What stands in a document."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def drawn(text: str) -> dict[str, dict[str, object]]:
    found = re.search(r'<script type="application/json" id="charts">(.*?)</script>', text, re.DOTALL)
    assert found
    options: dict[str, dict[str, object]] = json.loads(found[1])
    return options


def test_a_report_shows_the_values_of_the_run(run: Run, tmp_path: Path) -> None:
    events.record(run.events, "checkpoint_saved", "sft", step=5, uri="x")
    said = write_report(run.uri, str(tmp_path / "out.html"))
    assert "out.html" in said
    text = (tmp_path / "out.html").read_text()
    elements = Elements(text)
    assert elements.addresses == []
    assert "const echarts=" in text
    series = [one for options in drawn(text).values() for one in options["series"]]  # type: ignore[attr-defined]
    loss = next(one for one in series if one.get("name") == "loss")
    assert loss["data"] == [[step, 5 / step] for step in range(1, 11)]
    marks = [one["markLine"]["data"] for one in series if one.get("name") == "marks"]
    assert all([mark["xAxis"] for mark in each] == [5] for each in marks)


def test_texts_of_a_run_stay_texts(tmp_path: Path) -> None:
    run = new_run(tmp_path, "<b>run<b>".replace("/", ""))
    make_steps(run, range(1, 4), **{EVIL: 1.0, ":x": 2.0})
    events.record(run.events, "failure", "sft", error=EVIL)
    events.record(run.events, "alarm", "sft", what=EVIL, reason=EVIL, step=2)
    followed = Followed(run)
    followed.update()
    text = report(followed, "const echarts=0;")
    elements = Elements(text)
    assert elements.tags.count("script") == 2
    assert not {"img", "b"} & set(elements.tags)
    assert any(EVIL in shown for shown in elements.texts)
    assert any(one.get("name") == EVIL for options in drawn(text).values() for one in options["series"])  # type: ignore[attr-defined]


def test_json_in_a_script_cannot_end_it() -> None:
    for told in (EVIL, "<!--", "]]>", "\u2028", "&lt;"):
        text = safe_json({"a": told})
        assert json.loads(text) == {"a": told}
        assert not set("<>&\u2028") & set(text)


def test_the_library_is_a_whole_module_without_imports() -> None:
    text = echarts_script()
    assert "</script" not in text.lower()
    assert not re.match(r"\s*import\s*\{", text)
    assert re.search(r";const echarts=\w+;$", text)


def test_without_what_draws_it_is_told_what_to_install(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(made, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"postlude\[dashboard\]"):
        write_report(run.uri, str(tmp_path / "out.html"))
    with pytest.raises(UserError, match="is not a run"):
        write_report(str(tmp_path / "none"), str(tmp_path / "out.html"))
