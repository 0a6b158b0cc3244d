"""One reader a run: what comes is there with the next look, each step once, and what cannot be read is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from dashboard.conftest import make_steps, new_run
from postlude.dashboard.followed import Followed, Following, seconds_left, trailing_means
from postlude.runs import Run
from postlude.storage import Journal
from postlude.telemetry import events


def test_what_comes_is_seen_with_the_next_look(run: Run) -> None:
    followed = Followed(run)
    followed.update()
    assert followed.status is not None
    assert (followed.stages(), followed.current_stage(), followed.troubles) == (["sft", "more"], "sft", {})
    assert followed.curve("sft", "loss", 100).steps.tolist() == list(range(1, 11))
    followed.update()
    before = followed.version
    followed.update()
    assert followed.version == before
    make_steps(run, [11])
    followed.update()
    assert followed.version > before
    assert followed.curve("sft", "loss", 100).values[-1] == 5 / 11
    events.record(run.events, "checkpoint_saved", "sft", step=11, uri="x")
    followed.update()
    events.record(run.events, "checkpoint_saved", "sft", step=12, uri="x")
    followed.update()
    assert [event.step for event in followed.events()] == [11, 12]  # type: ignore[attr-defined]
    run.events.rewrite(list(run.events.lines())[1:])
    followed.update()
    assert [event.step for event in followed.events()] == [12]  # type: ignore[attr-defined]


def test_each_step_stands_once_when_a_resume_has_gone_back(run: Run) -> None:
    followed = Followed(run)
    followed.update()
    followed.curve("sft", "loss", 100)
    run.stage("sft").cut_back(6)
    make_steps(run, range(7, 13), entropy=0.5)
    followed.update()
    assert followed.columns("sft").steps.tolist() == list(range(1, 13))
    assert followed.curve("sft", "entropy", 100).steps.tolist() == list(range(7, 13))


def test_a_run_that_is_removed_or_damaged_or_newer_is_told_and_comes_back(run: Run, tmp_path: Path) -> None:
    followed = Followed(run)
    followed.update()
    kept = tmp_path.parent / f"{tmp_path.name}-kept"
    shutil.move(run.uri, kept)
    followed.update()
    assert followed.status is None
    assert "removed or moved" in followed.troubles["run"]
    shutil.move(kept, run.uri)
    followed.update()
    assert followed.status is not None
    assert followed.troubles == {}
    metrics = Path(run.stage("sft").metrics.uri)
    whole = metrics.read_bytes()
    metrics.write_bytes(whole + b'{"step": nonsense}\n')
    followed.update()
    assert "metrics.jsonl" in followed.troubles["metrics of sft"]
    assert followed.columns("sft").steps.tolist() == list(range(1, 11))
    metrics.write_bytes(whole + json.dumps({"step": 11, "schema": 99}).encode() + b"\n")
    followed.update()
    assert "newer" in followed.troubles["metrics of sft"]
    metrics.write_bytes(whole + b'{"step": 11, "lo')  # a last line that is still being written
    followed.update()
    assert followed.troubles == {}


def test_damaged_events_hide_nothing_else(run: Run) -> None:
    Journal(run.events.uri).append({"time": "2026", "kind": "nonsense"})
    followed = Followed(run)
    followed.update()
    assert "events.jsonl" in followed.troubles["events"]
    assert followed.status is not None
    assert followed.stages() == ["sft", "more"]


def test_means_are_those_of_the_last_finite_values() -> None:
    generator = np.random.default_rng(1)
    values = generator.normal(size=200)
    values[generator.integers(0, 200, 20)] = np.nan
    steps = np.arange(1, 201)
    found_steps, found = trailing_means(steps, values, 7)
    finite = values[np.isfinite(values)]
    expected = [finite[max(end - 7, 0) : end].mean() for end in range(1, len(finite) + 1)]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    assert found_steps.tolist() == steps[np.isfinite(values)].tolist()


def test_smoothing_follows_from_the_steps_and_not_from_the_zoom(run: Run) -> None:
    followed = Followed(run)
    near, far = (followed.curve("sft", "loss", 100, first, 10, over=3) for first in (8, 1))
    assert near.values.tolist() == far.values[-3:].tolist()


def test_time_left_follows_from_the_recent_steps(run: Run) -> None:
    followed = Followed(run)
    assert seconds_left(followed.columns("sft")) == pytest.approx(390 * 2.0)
    assert seconds_left(followed.columns("more")) is None


def test_only_runs_of_the_folder_are_found_and_only_those_looked_at_are_followed(run: Run, tmp_path: Path) -> None:
    new_run(tmp_path / "elsewhere", "secret")
    following = Following(str(tmp_path))
    followed = following.find("small")
    assert followed is not None
    assert following.find("small") is followed
    for name in ("elsewhere/secret", "../" + tmp_path.name + "/small", run.uri, ".", "..", "", "none", "memory://x"):
        assert following.find(name) is None
    following.update()
    assert followed.status is not None
    followed.looked_at -= 1000
    following.update()
    assert following.find("small") is not followed


def test_a_folder_that_is_a_run_holds_that_alone(run: Run) -> None:
    following = Following(run.uri)
    assert following.overview.names() == ["small"]
    assert following.find("small") is not None
    assert following.find("sft") is None
