"""What a stage's result follows from: the day that its chat templates are told."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from postlude.manifest.load import load
from postlude.runs import Identity, Run
from postlude.runs.stage import Stage
from postlude.workflow import fingerprint
from postlude.workflow.fingerprint import Identifier

DATED = "{{ strftime_now('%d %B %Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a model of the hub into a cache, as a download does."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    fingerprint._hub_files.cache_clear()

    def put(name: str, files: dict[str, str]) -> None:
        folder = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
        for file, content in files.items():
            (folder / "snapshots" / ("0" * 40) / file).write_text(content)

    return put


def identified(folder: Path, model: str, *, template: str | None = None, today: str | None = None) -> Identity:
    (folder / "d.jsonl").write_text("{}\n")
    data: dict[str, Any] = {"source": {"path": str(folder / "d.jsonl")}, "format": "messages"}
    tree = {
        "name": "dated",
        "run_dir": str(folder / "runs"),
        "data": {"d": {**data, **({"template": template} if template else {})}},
        "stages": {"s": {"recipe": "sft", "model": {"path": model}, "data": {"d": 1.0}, "steps": 1}},
        **({"today": today} if today else {}),
    }
    resolved = load(json.dumps(tree).encode(), "dated.yaml", [])
    return Identifier(resolved, Run(str(folder / "runs" / "dated")))("s", {}, {})


@pytest.mark.capability("The day that a chat template writes is part of the fingerprint, wherever the template is from")
def test_the_day_is_noted_where_a_template_writes_it(hub: Any, tmp_path: Path) -> None:
    hub("some/dated", {"tokenizer_config.json": json.dumps({"chat_template": DATED})})
    hub("some/file", {"tokenizer_config.json": "{}", "chat_template.jinja": DATED})
    hub("some/plain", {"tokenizer_config.json": json.dumps({"chat_template": PLAIN})})
    now = date.today().isoformat()
    for model in ("some/dated", "some/file"):
        assert identified(tmp_path, model).day in (now, date.today().isoformat())
        assert identified(tmp_path, model, today="2026-01-31").day == "2026-01-31"
    for model in ("some/plain", "some/missing", "./nowhere"):
        assert identified(tmp_path, model, today="2026-01-31").day is None
        assert identified(tmp_path, model, template=DATED, today="2026-01-31").day == "2026-01-31"
    first, second = (identified(tmp_path, "some/dated", today=day).fingerprint for day in ("2026-01-31", "2026-02-01"))
    assert first != second


def test_a_stage_goes_on_with_the_day_that_it_was_begun_with(
    hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub("some/dated", {"chat_template.jinja": DATED})
    begun = Run(str(tmp_path / "runs" / "dated")).stage("s")
    monkeypatch.setattr(Stage, "has_begun", lambda stage: True)
    for day in ("2020-02-29", None):  # the latter of a version that did not look at templates of the hub
        Identity(day=day).write(begun.identity_uri)
        assert identified(tmp_path, "some/dated").day == day
