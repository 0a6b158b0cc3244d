"""Every report fits the line: nothing is cut, no line is longer, and every value is there."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from postlude.cli.app import app
from postlude.data.preview import Preview, PreviewBlock, PreviewDocument, PreviewToken
from postlude.data.statistics import Dropped, SourceStatistics, Statistics
from postlude.data.synthetic import Verdict
from postlude.errors import DataError
from postlude.model.memory import MemoryPlan
from postlude.model.verify import DocumentErrors, Verification
from postlude.runs import Identity, Run
from postlude.stages.evaluation import Evaluation
from postlude.stages.filtering import Filtering
from postlude.stages.generation import Generation
from postlude.stages.report import Rehearsal, StageReport, Trial
from postlude.telemetry import events, progress, screen
from postlude.telemetry.alarms import Standing
from postlude.telemetry.screen import Fields, Kind, Listing
from postlude.telemetry.summary import StageSummary
from postlude.training.precision import Precision
from postlude.workflow.plan import Decision, Plan
from postlude.workflow.status import Runs, RunStatus, StageStatus
from postlude.workflow.validate import Report

WIDTHS = (80, 140)

REASON = "the completions are empty, and what was to be compared is not there: loosen 'keep' or look at the reward"

Make = Callable[[Callable[[str], str]], Any]
"""A report, of a function that names what a user names."""


def printed(report: Any, width: int) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width).print(report)
    return out.getvalue().splitlines()


def parts(seen: Any) -> SimpleNamespace:
    """Stands in for a stage at work, of which a report needs the name."""
    return SimpleNamespace(parts=SimpleNamespace(task=SimpleNamespace(stage=seen("report"))), config=seen)


def statistics(name: Callable[[str], str]) -> Statistics:
    source = SourceStatistics(
        name("conversations"), 12_345_678, read=1_234_567, truncated=123_456, tokens_cut=98_765_432
    )
    source.lengths.update({1 << power: 12_345 for power in range(18)})
    source.trained_tokens = 1_234_567
    source.filtered["len(messages) >= 2 AND quality > 0.25 AND language = 'en'"] = Dropped(1_234, ["a.jsonl:1"] * 5)
    source.dropped[REASON] = Dropped(
        99_999, [f"hub/{name('organisation')}/rows-{row}.parquet:{row}" for row in range(5)]
    )
    return Statistics({source.name: source}, {source.name: 12.5}, 131_072, 12_345_678, 10**12, 10**7, 0.98765, True)


def stage_report(name: Callable[[str], str]) -> Report:
    plan = MemoryPlan(*[7 * 10**11] * 2, *[80 * 2**30] * 8)
    precision = Precision("bf16", "auto: the checkpoint is stored in bf16, and the GPU computes in it without loss")
    counts = {"generation": {name("unseen"): {"prompts": 12_345, "no prompt": {"count": 5, "examples": ["a"]}}}}
    report = StageReport(name("sft"), 64, 16, statistics(name), Rehearsal(plan, precision, 1.25, 3.5, 11.9))
    report.trial = Trial(counts, {"prompts": 4, "completions": 8, "records": 4, "tokens": 12_345, "stopped": 0.125})
    report.awaited, report.held_out = {name("pairs"): name("answers")}, {name("unseen"): 12_345}
    report.remarks = [REASON]
    report.synthetic = {name("chats"): [Verdict("a tool call with nested arguments", "read", REASON, 12, False)]}
    return Report("run.yaml", [report, report], DataError(f"{name('a.jsonl')}:17: {REASON}."))


def preview(name: Callable[[str], str]) -> Preview:
    tokens = [
        PreviewToken(7, text, text != "user") for text in ("user", "\n", "日本語のテキスト" * 9, "x" * 300, "\t", "y ")
    ]
    return Preview([PreviewBlock([PreviewDocument(f"{name('chats')}.jsonl:1", name("chats"), tokens)])])


def status(name: Callable[[str], str]) -> RunStatus:
    run = Run(f"memory://{name('screens')}")
    names = [name(stage) for stage in ("sft", "answers", "judge", "dpo", "rl", "student", "report")]
    stages = [
        StageStatus(
            StageSummary(stage, "interrupted", 12_345, 5.25, 0.125, tokens=10**9, seconds=10**5),
            12_340,
            REASON,
            names[max(0, place - 3) : place],
            revision=place,
            taken_over_from=name("base") if place % 2 else None,
            readings=[{"rank": 1, "host": name("node"), "step": 9, "resident_bytes": 2**40, "round_trip_seconds": 0.1}],
        )
        for place, stage in enumerate(names)
    ]
    alarm = events.Alarm(
        kind="alarm", time="2026-01-01T00:00:00Z", stage=names[0], what="checkpoint not saved", reason=REASON
    )
    return RunStatus(run, stages, f"process 4711 on {name('node')}", [alarm], standing=[Standing(alarm)])


def plan(name: Callable[[str], str]) -> Plan:
    states = status(name).stages
    identity = Identity(revision=12)
    return Plan(
        Run(f"memory://{name('screens')}"),
        [
            Decision(state.summary.stage, "run again", identity, state.needs, reasons=[f"{name('lr')}: 1 -> 2", REASON])
            for state in states
        ],
    )


def evaluated(name: Callable[[str], str]) -> Any:
    numbers = {"reward": 0.123456, "reward_error": 0.01, "pass_at_4": 0.5, "pass_at_4_error": 0.25}
    models = {name(model): {"generation": {name("unseen"): numbers}} for model in ("sft", "dpo", "rl", "student")}
    return Evaluation.table(parts(name), {"models": models})  # type: ignore[arg-type]


def generated(name: Callable[[str], str]) -> Any:
    report = {"prompts": 10**7, "completions": 10**8, "records": 10**7, "tokens": 10**11, "stopped": 0.5, "reward": 0.1}
    return Generation.table(parts(name), {**report, "nothing_of": {REASON: {"count": 48}}})  # type: ignore[arg-type]


def filtered(name: Callable[[str], str]) -> Any:
    report = {"read": 10**9, "records": 10**8, "reward": 0.5, "dropped_by_filters": {name("chats"): {REASON: 12_345}}}
    return Filtering.table(parts(name), report)  # type: ignore[arg-type]


def verification(name: Callable[[str], str]) -> Verification:
    return Verification(f"{name('Llama')}ForCausalLM", "bfloat16", "cuda:0", 3e-2, (DocumentErrors(2048, 0.5, 0.25),))


REPORTS: Mapping[str, Make] = {
    "validate": lambda name: stage_report(name).render(),
    "preview": lambda name: preview(name).render(),
    "plan": lambda name: plan(name).render(),
    "status": lambda name: status(name).render(),
    "runs": lambda name: Runs([status(name)] * 3).render(),
    "evaluated": evaluated,
    "generated": generated,
    "filtered": filtered,
    "verify": lambda name: verification(name).render(),
}


@pytest.mark.capability("Every report fits a line of 80 columns, and uses a wider one")
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("length", [3, 12, 40])
@pytest.mark.parametrize("report", REPORTS)
def test_no_report_is_cut_or_longer_than_the_line(report: str, length: int, width: int) -> None:
    lines = printed(REPORTS[report](lambda word: f"{word}-{word * length}"[:length]), width)
    assert [line for line in lines if "…" in line] == []
    assert [line for line in lines if cell_len(line) > width] == []


def test_seven_stages_are_a_table_at_80_columns_with_whole_heads() -> None:
    lines = printed(status(lambda word: word).render(), 80)
    assert lines[1].split() == ["stage", "state", "step", "loss", "checkpoint"]
    for number in ("12,345", "0.1250", "step 12,340"):
        assert sum(number in line for line in lines) == 7


CELLS = st.text(st.characters(exclude_categories=["C", "Z"]), max_size=30) | st.sampled_from(["", "two words", "1\n2"])
KINDS: list[Kind] = ["text", "whole", "number"]


@given(st.lists(st.tuples(st.sampled_from(KINDS), st.lists(CELLS, min_size=3, max_size=3)), min_size=1, max_size=9),
       st.integers(40, 140))  # fmt: skip
def test_a_listing_keeps_every_character_and_fits_any_line(columns: list[tuple[Kind, list[str]]], width: int) -> None:
    heads: dict[str, Kind] = {f"head{place}": kind for place, (kind, _) in enumerate(columns)}
    listing = Listing("title", heads)
    for row in range(3):
        listing.add_row(*(cells[row] for _, cells in columns))
    fields = Fields("title", [(f"name{place}", cell) for place, (_, cells) in enumerate(columns) for cell in cells])
    for report in (listing, fields):
        lines = printed(report, width)
        assert [line for line in lines if cell_len(line) > width] == []
        given_characters = sorted("".join(cell for _, cells in columns for cell in cells if cell).replace("\n", ""))
        there = sorted("".join(lines))
        for character in set(given_characters) - {" ", ","}:
            assert there.count(character) >= given_characters.count(character), character


def test_the_width_is_that_of_the_terminal_or_80_or_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert screen.open_console().width == screen.open_console(stderr=True).width == 80
    monkeypatch.setenv("COLUMNS", "133")
    assert screen.open_console().width == 133


def test_sentences_are_broken_between_words_on_a_terminal_and_never_in_a_file() -> None:
    text, path = " ".join(["words"] * 20), "/" + "folder/" * 20
    for terminal, expected in ((True, [text[:77], text[78:], path]), (False, [f"{text} {path}"])):
        out = io.StringIO()
        screen.prose(Console(file=out, width=80, force_terminal=terminal, no_color=True), f"{text} {path}")
        assert [line.strip() for line in out.getvalue().splitlines()] == expected


def test_a_live_line_keeps_to_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "console", lambda: Console(file=io.StringIO(), width=80))
    shown = progress.StageProgress("a-stage-name")
    shown.update({"step": 12_345, "progress": 0.5, "loss": 1.25, "tokens_per_second": 123_456.0})
    assert len(printed(shown._render(), 80)) == 1


def test_help_fits_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    commands = [command.callback.__name__ for command in app.registered_commands if command.callback]
    for command in ([], *([name] for name in commands)):
        shown = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"}).output
        assert "…" not in shown, command
        assert max(map(cell_len, re.sub(r"\x1b\[[0-9;]*m", "", shown).splitlines())) <= 80
