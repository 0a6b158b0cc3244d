"""A run on worker groups whose folder is taken from it: its ranks write nothing more, and end."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.long


def _put_a_copy(run: Path) -> None:
    run.rename(run.with_name("moved"))
    shutil.copytree(run.with_name("moved"), run)


def _remove_lock(run: Path) -> None:
    (run / "run.lock").unlink()


@pytest.mark.capability("A process that lost its run writes nothing more there, however it lost it")
def test_of_two_controllers_with_ranks_one_ends_and_the_other_is_undisturbed(project, new_project, tmp_path_factory):
    calm = new_project(tmp_path_factory.mktemp("calm")).finished()
    run = Path(project.run.uri)
    for lose in (_put_a_copy, _remove_lock):
        said = _lose(project, run, lose)
        assert "is no longer this process's" in said or "was removed or replaced while process" in said
        assert "Traceback" not in said
        assert not project.ranks()
    project.start()
    project.ended()
    assert project.lines() == calm


def _lose(project, run: Path, lose: Callable[[Path], None]) -> str:
    """Start it, take its folder from it, and hear how it ends."""
    before = project.step()
    project.start()
    project.until(lambda: project.step() >= before + 12)
    lose(run)
    return " ".join(project.ended(1).split())
