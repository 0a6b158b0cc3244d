"""What a person is told on standard error."""

from __future__ import annotations

import io
import re
import time

import pytest
from rich.console import Console

from postlude import storage
from postlude.runs import Run
from postlude.telemetry import events, progress
from postlude.telemetry.progress import StageProgress, duration, stage_table, waiting
from postlude.telemetry.summary import summarize


@pytest.fixture(params=[False, True], ids=["file", "terminal"])
def shown(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is printed, on a terminal or not."""
    output = io.StringIO()
    console = Console(file=output, force_terminal=request.param, width=200, highlight=False)
    monkeypatch.setattr(progress, "console", lambda: console)
    return output


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the progress line sees, as a list of one."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def _line(step: int, share: float) -> dict:
    return {"step": step, "progress": share, "loss": 2.5 / step, "tokens_per_second": 12_345.6}


def test_the_line_tells_step_rate_loss_and_time_left(shown: io.StringIO) -> None:
    with StageProgress("sft") as stage:
        stage.update(_line(1, 0.25))
        stage.update(_line(4, 1.0))
    last = shown.getvalue().strip().splitlines()[-1]
    assert "sft: step 4, 100%, loss 0.6250, 12,346 tokens/s" in last


def test_the_time_left_follows_the_share_that_is_done(clock: list[float]) -> None:
    stage = StageProgress("sft")
    stage.update(_line(50, 0.5))  # a resume begins in the middle
    assert stage.seconds_left() is None
    for step in range(51, 61):
        clock[0] += 2.0
        stage.update(_line(step, step / 100))
    assert stage.seconds_left() == pytest.approx(80.0)


def test_plain_lines_come_at_intervals(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    with StageProgress("sft") as stage:
        for step in range(1, 26):
            stage.update(_line(step, step / 25))
            clock[0] += 1.0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.findall(r"step (\d+)", captured.err) == ["1", "11", "21", "25"]


def test_alarms_are_told_at_once(shown: io.StringIO) -> None:
    journal = storage.Journal("memory://telling/events.jsonl")
    with StageProgress("sft") as stage:
        stage.event(events.record(journal, "alarm", "sft", what="checkpoint not saved", reason="[disk] full"))
        stage.event(events.record(journal, "checkpoint_saved", "sft", step=3, uri="x"))
    assert "sft: ALARM: checkpoint not saved: [disk] full" in shown.getvalue()
    assert "checkpoint_saved" not in shown.getvalue()


@pytest.mark.capability("No silent wait: what is waited for is said")
def test_a_long_wait_is_told_and_a_short_one_is_not(shown: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    with waiting("nothing"):
        pass
    assert shown.getvalue() == ""
    monkeypatch.setattr(progress, "WAIT_SECONDS", 0.01)
    with waiting("the other [ranks]"):
        while shown.getvalue().count("Waiting for the other [ranks] (0s)") < 2:
            time.sleep(0.005)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0s"),
        (59.6, "1m00s"),
        (185, "3m05s"),
        (7_620, "2h07m"),
        (86_399.9, "1d00h"),
        (3 * 86_400 + 15_000, "3d04h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_table_tells_what_came_out_of_each_stage(shown: io.StringIO) -> None:
    run = Run(f"memory://{time.monotonic_ns()}")
    stage = run.stage("sft")
    stage.enter("done")
    for step in (1, 2, 3):
        stage.metrics.append({"step": step, "loss": 4.0 - step, "tokens": 1000, "seconds": 0.5})
    stage.metrics.append({"step": 4, "loss": None}, sync=True)
    for step, loss in ((0, 5.0), (2, 3.0), (4, 2.0)):
        events.record(run.events, "evaluation", "sft", step=step, name="held_out", loss=loss)
    events.record(run.events, "evaluation", "other", step=9, name="held_out", loss=9.0)
    sft, dpo = summarize(run, ["sft", "dpo"])
    assert (sft.state, sft.steps, sft.tokens, sft.tokens_per_second) == ("done", 4, 3000, 2000)
    assert (sft.first_loss, sft.last_loss) == (3.0, 1.0)
    assert sft.held_out_losses == {"held_out": (5.0, 2.0)}
    assert (dpo.state, dpo.steps, dpo.tokens_per_second) == ("pending", 0, None)
    stage_table(run, ["sft", "dpo"])
    for part in ("sft", "3.0000 → 1.0000", "held_out 5.0000 → 2.0000", "3,000", "2,000", "dpo", "pending"):
        assert part in shown.getvalue()


def test_what_comes_before_the_first_step_is_told(shown: io.StringIO) -> None:
    with StageProgress("dpo") as stage:
        stage.preparing("the reference reads the data", 0.25)
        if stage._live:
            stage._live.refresh()
    assert "dpo: the reference reads the data, 25%" in shown.getvalue()
