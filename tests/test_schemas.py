"""The schemas of lines are what writers write, and what docs/run_directory.md says."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from earlier.make import unpack
from postlude.rollout.ledger import Issue, Ledger, LedgerState
from postlude.rollout.prompts import Prompt
from postlude.rollout.reward_pool import Unscored
from postlude.rollout.scoring import Score
from postlude.rollout.trajectory import Trajectory
from postlude.runs import Run, schemas, tokens
from postlude.runs.examples import _schema
from postlude.storage import Line, NewerSchema
from postlude.telemetry import events
from postlude.telemetry.readings import Reading
from postlude.workflow import status
from postlude.workflow.begin import mend_records

PAGE = Path(__file__).parents[1] / "docs" / "run_directory.md"

LINES = (
    schemas.MetricsLine,
    schemas.RolloutLine,
    LedgerState,
    schemas.ReadingLine,
    schemas.AmendmentLine,
    schemas.ExampleRow,
    schemas.EventLine,
)

NAMES = {int: "integer", float: "number", str: "text", bool: "true or false", Any: "anything", type(None): ""}


def in_words(annotation: Any) -> str:
    """A type as the page names it."""
    inner = typing.get_args(annotation)
    match typing.get_origin(annotation):
        case typing.Union | types.UnionType:
            names = list(filter(None, map(in_words, inner)))
            return " or ".join(name for name in names if name != "integer" or "number" not in names)
        case origin if origin is not None and issubclass(origin, Mapping):
            return f"{in_words(inner[1])} by name"
        case origin if origin is not None and issubclass(origin, Sequence):
            return f"list of {in_words(inner[0])}"
    return NAMES[annotation]


def plain(text: str | None) -> str:
    return " ".join((text or "").replace("``", "`").split())


def table(schema: type[Line]) -> str:
    lines = [f"{plain(schema.__doc__)} Version {schema.version}.", ""]
    lines += ["| field | type | unit | what it is |", "| --- | --- | --- | --- |"]
    for name, info in schema.model_fields.items():
        unit = next((mark for mark in info.metadata if isinstance(mark, str)), "")
        kind = in_words(info.annotation) + ("" if info.is_required() else ", optional")
        lines.append(f"| `{name}` | {kind} | {unit} | {plain(info.description)} |")
    return "\n".join(lines) + "\n"


def table_of_events() -> str:
    lines = ["| kind | its fields | when |", "| --- | --- | --- |"]
    for kind, event in events._KINDS.items():
        own = {name: info for name, info in event.model_fields.items() if name not in schemas.EventLine.model_fields}
        fields = ", ".join(f"`{name}` {in_words(info.annotation)}" for name, info in own.items())
        lines.append(f"| `{kind}` | {fields} | {plain(event.__doc__)} |")
    return "\n".join(lines) + "\n"


def test_the_page_shows_the_schemas() -> None:
    page = PAGE.read_text()
    for part in [*map(table, LINES), table_of_events()]:
        assert part in page, f"Put this into {PAGE.name}:\n\n{part}"


def validate(schema: type[Line], line: dict[str, Any]) -> None:
    schema.model_validate({name: list(value) if isinstance(value, tuple) else value for name, value in line.items()})


def test_the_lines_of_a_run_of_an_earlier_version_are_of_the_first(tmp_path: Path) -> None:
    run = Run(str(unpack("killed", tmp_path)))
    counts = dict.fromkeys(("metrics", "rollouts", "amendments", "readings"), 0)
    for stage in run.stages():
        for name in counts:
            journal = getattr(stage, name)
            for line in journal.read():
                validate(journal.schema, line)
                counts[name] += 1
    assert counts["metrics"] > 20
    assert counts["rollouts"] > 20
    assert {event.kind for event in events.read(run.events)} >= {"run_started", "checkpoint_saved", "evaluation"}


def test_a_sample_is_told_as_its_schema_says() -> None:
    issue = Issue(3, 0, "prompts", 0, 7)
    prompt = Prompt("prompts:1", "prompts", [{"role": "user", "content": "?"}], None, None, {})
    sample = Trajectory.begin(issue, prompt, 0, [1, 2])
    sample.replies, sample.turns, sample.score = ["well"], ["a", "b"], Score(1.0, {"regex": 1.0})
    one = np.zeros(1, np.float32)
    sample.recorded = tokens.told(["a", "b"], [False, True], [0], one, one, one)
    validate(schemas.RolloutLine, {"step": 1, **sample.line(), "advantage": 0.5, "outcome": "trained"})
    sample.score = Unscored("slow", "it took too long")
    validate(schemas.RolloutLine, {"step": 1, **sample.line(), "outcome": "dropped", "reason": "unscored"})


def test_a_reading_is_told_as_its_schema_says() -> None:
    of_the_controller = {"time", "rank", "host", "round_trip_seconds"}
    fields = {field.name for field in dataclasses.fields(Reading)}
    assert set(schemas.ReadingLine.model_fields) == fields | of_the_controller
    engine = {"version": 3, "requests": 8, "tokens": 90, "seconds": 1.5}
    reading = Reading(1, 2**20, 5, {"seconds": 0.5}, {"rank_round_trip_seconds": 0.001}, {"native 0": engine})
    line = {"time": "2026-01-01T00:00:00.000+00:00", "rank": 0, "host": "a", "round_trip_seconds": 0.001}
    validate(schemas.ReadingLine, {**line, **reading.to_json()})


def test_losses_by_example_have_the_columns_of_their_schema() -> None:
    arrow = {int: "int64", float: "double", str: "string"}
    fields = {name: arrow[info.annotation] for name, info in schemas.ExampleRow.model_fields.items()}
    assert {field.name: str(field.type) for field in _schema()} == fields


def files_of(run: Run) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path(run.uri).rglob("*") if path.is_file()}


def test_a_run_of_a_newer_version_is_told_as_one(tmp_path: Path) -> None:
    run = Run(str(unpack("killed", tmp_path)))
    metrics = run.stage("sft").metrics
    count = len(metrics.read())
    with open(metrics.uri, "a") as file:
        file.write('{"step": 1000, "schema": 2}\n')
    with pytest.raises(NewerSchema, match=rf"metrics.jsonl', line {count + 1}, .* version 2 .* later than 1: .*pip"):
        status.status(run.uri)
    before = files_of(run)
    with pytest.raises(NewerSchema, match=r"The last line of '.*metrics.jsonl' is of version 2"):
        mend_records(run)
    assert files_of(run) == before
    [listed] = status.runs(str(tmp_path / "runs")).runs
    assert listed.state == "newer"
    assert "version 2" in listed.to_json()["damage"]


def test_the_ledger_keeps_what_its_schema_says() -> None:
    class Rows:
        groups, files, seekable = [3, 4], [[0, 1]], True

    ledger = Ledger({"a": Rows()}, {"a": 1.0}, seed=1, epochs=None)
    first, second, *_ = ledger.issue(4)
    ledger.settle(first)
    ledger.settle(second, "unscored")
    state = ledger.state()
    LedgerState.model_validate({**state, "again": list(map(list, state["again"]))})
    assert {*state, "mixture"} == set(LedgerState.model_fields)
    with pytest.raises(Exception, match=r"ledger of prompts .* version 2"):
        ledger.load({**state, "schema": 2})
