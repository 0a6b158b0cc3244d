"""A run that an earlier version began, and that was killed, goes on with this version as if nothing had happened.

`tests/earlier/make.py` made the run with that version, and another that was not disturbed. Bits hang on the processor
as well, so they must be the same wherever it is of the kind that made them, or this version undisturbed comes to those
very bits. Elsewhere rounding may differ; what was committed before the kill may not.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from earlier.make import ARGUMENTS, DONE, ENVIRONMENT, HERE, KILLED, RUN, copy_project, machine, steps_committed, unpack
from results import read_lines, stage_differences, stages_of

NOT_BEGUN = ("judge", "merged", "report")
WITHOUT_GENERATION_CONFIG = ("dpo", "judge")
"""An adapter and a classifier: what they are made with had none beside it then."""

NEW_METRIC = re.compile("metrics, entry [0-9]+: update_ratio(_critic)? is only in the second")
"""It is measured since."""

ROUNDING = 1e-4
"""By how much numbers may differ between two kinds of processors."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of the earlier version that nothing disturbed."""
    return unpack("undisturbed", tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run as the earlier version left it."""
    return unpack("killed", tmp_path_factory.mktemp("killed"))


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The killed run, brought to its end by this version."""
    folder = copy_project(tmp_path_factory.mktemp("resumed"))
    unpack("killed", folder)
    return run_here(folder)


@pytest.fixture(scope="module")
def tolerance(undisturbed: Path, tmp_path_factory: pytest.TempPathFactory) -> float:
    """By how much numbers may differ: not at all, except where it is seen that this machine computes other bits."""
    if machine() == json.loads((HERE / "machine.json").read_text()):
        return 0.0
    fresh = run_here(copy_project(tmp_path_factory.mktemp("fresh")))
    differences = [found for stage in stages_of(undisturbed) for found in unexpected(undisturbed, fresh, stage)]
    return ROUNDING if differences else 0.0


def unexpected(before: Path, after: Path, stage: str, tolerance: float = 0.0) -> list[str]:
    """Where a stage of two runs differs, though nothing else is measured of it now."""
    found = stage_differences(before, after, stage, tolerance)
    return [each for each in found if not NEW_METRIC.fullmatch(each)]


def run_here(folder: Path) -> Path:
    done = subprocess.run([sys.executable, *ARGUMENTS], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / RUN


def test_every_stage_begins_where_the_kill_left_it(killed: Path, resumed: Path) -> None:
    events = read_lines(resumed / "events.jsonl")[len(read_lines(killed / "events.jsonl")) :]
    started = {event["stage"]: event["from_step"] for event in events if event["kind"] == "stage_started"}
    committed = {stage: steps_committed(killed / "stages" / stage) for stage in KILLED}
    assert min(committed.values()) > 0
    assert started == {**committed, **dict.fromkeys(NOT_BEGUN, 0)}


@pytest.mark.parametrize("stage", [*DONE, *KILLED])
def test_what_was_committed_stays_as_it_was(killed: Path, resumed: Path, stage: str) -> None:
    before, after = (read_lines(run / "stages" / stage / "metrics.jsonl") for run in (killed, resumed))
    step = steps_committed(killed / "stages" / stage)
    assert after[:step] == before[:step]
    if stage in DONE:
        assert not list(stage_differences(killed, resumed, stage))


@pytest.mark.capability("A run that an earlier version began goes on, bitwise as if undisturbed")
@pytest.mark.parametrize("stage", [*DONE, *KILLED, *NOT_BEGUN])
def test_the_end_is_that_of_the_earlier_version(undisturbed: Path, resumed: Path, stage: str, tolerance: float) -> None:
    added = ["model: generation_config.json is only in the second"] if stage in WITHOUT_GENERATION_CONFIG else []
    assert unexpected(undisturbed, resumed, stage, tolerance) == added
