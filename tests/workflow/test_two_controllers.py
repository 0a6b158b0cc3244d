"""Two processes that work on one run, by every way to come to that: one ends with the lock's error, and what the other
makes is bitwise what a run makes that nobody disturbed.

The processes are real ones, forked from one that has everything imported: each is there at once.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from no_flock import refuse_flock, require_refusal
from results import DIGESTS, read_metrics

STEPS = 120
PATIENCE_SECONDS = 120.0

_heavy = ("torch", "transformers", "datasets", "postlude.cli", "postlude.workflow.run", "postlude.stages.training")
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload([*_heavy, "postlude.recipes.sft", "workflow.test_two_controllers"])


def _postlude(folder: str, output: str, arguments: list[str], prepare: Callable[[], None] | None) -> None:
    from postlude.cli import main

    os.chdir(folder)
    os.setsid()
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    if prepare is not None:
        prepare()
    sys.argv = ["postlude", *arguments]
    main()


class Controller:
    """A process that runs ``postlude``."""

    def __init__(self, folder: Path, *arguments: str, prepare: Callable[[], None] | None = None) -> None:
        self.output = folder / f"output-{time.monotonic_ns()}"
        arguments_of_process = (str(folder), str(self.output), list(arguments), prepare)
        self.process: BaseProcess = _processes.Process(target=_postlude, args=arguments_of_process)
        self.process.start()

    def ended(self) -> tuple[int | None, str]:
        """Its exit code, and what it printed in one line."""
        self.process.join(PATIENCE_SECONDS)
        if self.process.exitcode is None:
            self.process.kill()
        said = self.output.read_text() if self.output.exists() else ""
        return self.process.exitcode, " ".join(said.split())


class Runs:
    """A folder with a manifest, and the controllers at work there."""

    def __init__(self, folder: Path, project: Any) -> None:
        self.folder, self.project = folder, project
        self.run = folder / "runs" / "small"
        self.controllers: list[Controller] = []
        project.stage |= {"steps": STEPS, "checkpoint": {"every": 5, "keep": 2}}
        project.manifest["run_dir"] = "runs"
        project.write()

    def start(self, run_dir: str = "runs", prepare: Callable[[], None] | None = None) -> Controller:
        arguments = ("run", str(self.project.path), "--inline", f"run_dir={run_dir}")
        self.controllers.append(Controller(self.folder, *arguments, prepare=prepare))
        return self.controllers[-1]

    def await_step(self, step: int, run: Path | None = None) -> None:
        """Wait until a run has got so far."""
        metrics = (run or self.run) / "stages" / "sft" / "metrics.jsonl"
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= step):
            assert time.monotonic() < deadline, [each.ended() for each in self.controllers]
            assert any(each.process.exitcode is None for each in self.controllers), self.controllers[0].ended()
            time.sleep(0.005)


def made(run: Path) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """What a run came to: its metrics, and the files of its model."""
    stage = run / "stages" / "sft"
    model = {
        path.name: path.read_bytes()
        for path in sorted((stage / "model").iterdir())
        if path.name not in (DIGESTS, "lineage.json")
    }
    assert "model.safetensors" in model
    return read_metrics(stage), model


@pytest.fixture
def runs(tmp_path: Path, new_project: Any) -> Iterator[Runs]:
    runs = Runs(tmp_path, new_project(tmp_path))
    yield runs
    for controller in runs.controllers:
        controller.process.kill()
        controller.process.join()


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, new_project: Any) -> Any:
    """What an undisturbed run comes to."""
    folder = tmp_path_factory.mktemp("calm")
    runs = Runs(folder, new_project(folder))
    assert runs.start().ended()[0] == 0
    lines, model = made(runs.run)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return lines, model


# --- ways to lose a lock --------------------------------------------------------------------------------------


def _remove_lock(run: Path) -> None:
    (run / "run.lock").unlink()


def _copy_over_lock(run: Path) -> None:
    shutil.copy2(run / "run.lock", run / "copy")
    (run / "copy").replace(run / "run.lock")


def _write_lock_anew(run: Path) -> None:
    (run / "empty").write_text("")
    (run / "empty").replace(run / "run.lock")


def _move(run: Path) -> None:
    run.rename(run.with_name("moved"))


def _move_above(run: Path) -> None:
    run.parent.rename(run.parent.with_name("moved"))


def _remove(run: Path) -> None:
    while run.exists():
        subprocess.run(["rm", "-rf", str(run)], check=False)


def _put_a_copy(run: Path) -> None:
    _move(run)
    shutil.copytree(run.with_name("moved"), run)


def _put_a_copy_of_links(run: Path) -> None:
    _move(run)
    shutil.copytree(run.with_name("moved"), run, copy_function=os.link)
    (run / "stages" / "sft" / "metrics.jsonl").unlink()  # what is added to is no copy as a link
    shutil.copy(run.with_name("moved") / "stages" / "sft" / "metrics.jsonl", run / "stages" / "sft")


def _put_an_empty_one(run: Path) -> None:
    _move(run)
    run.mkdir()


def _turn_a_link(run: Path) -> None:
    target = run.parent.parent / "target"
    while not target.with_name("other").exists():
        with suppress(shutil.Error):  # an old checkpoint was removed meanwhile
            shutil.copytree(target, target.with_name("copy"))
            target.with_name("copy").rename(target.with_name("other"))
        shutil.rmtree(target.with_name("copy"), ignore_errors=True)
    link = run.with_name("link")
    link.symlink_to(target.with_name("other"))
    link.replace(run)


WAYS = (
    _remove_lock,
    _copy_over_lock,
    _write_lock_anew,
    _move,
    _move_above,
    _remove,
    _put_a_copy,
    _put_a_copy_of_links,
    _put_an_empty_one,
    _turn_a_link,
)


@pytest.mark.long
@pytest.mark.capability("Two controllers on one run: one ends with the lock's error, the other is bitwise undisturbed")
@pytest.mark.parametrize("lose", WAYS, ids=lambda way: way.__name__.strip("_"))
def test_of_two_controllers_one_ends_and_the_other_is_undisturbed(
    runs: Runs, calm: Any, lose: Callable[[Path], None]
) -> None:
    if lose is _turn_a_link:
        (runs.folder / "target").mkdir()
        runs.run.parent.mkdir()
        runs.run.symlink_to(runs.folder / "target")
    first = runs.start()
    runs.await_step(12)
    lose(runs.run)
    second = runs.start()
    code, said = first.ended()
    assert code == 1, said
    assert "is no longer this process's" in said or "was removed or replaced while process" in said
    assert "Traceback" not in said
    code, said = second.ended()
    assert code == 0, said
    assert made(runs.run) == calm


@pytest.mark.long
@pytest.mark.capability("A lock file that is removed stops the run with a checkpoint")
def test_alone_it_stops_with_a_checkpoint(runs: Runs, calm: Any) -> None:
    first = runs.start()
    runs.await_step(12)
    _remove_lock(runs.run)
    code, said = first.ended()
    assert code == 1
    assert "holds its checkpoint of step" in said
    reached = len(read_metrics(runs.run / "stages" / "sft"))
    assert 12 <= reached < STEPS
    assert (runs.run / "stages" / "sft" / "checkpoints" / f"step-{reached:08d}" / "COMMITTED").exists()
    assert runs.start().ended()[0] == 0
    assert made(runs.run) == calm


# --- other names ----------------------------------------------------------------------------------------------


def _bound(folder: Path) -> str | None:
    """The folder of runs under another name of the kernel's; None where nothing may be mounted."""
    (folder / "bound").mkdir()
    mounted = subprocess.run(["mount", "--bind", str(folder / "runs"), str(folder / "bound")], capture_output=True)
    return None if mounted.returncode else "bound"


@pytest.mark.long
def test_by_another_name_it_is_the_same_run(runs: Runs, calm: Any) -> None:
    first = runs.start()
    runs.await_step(5)
    folder = runs.folder
    (folder / "linked").symlink_to(folder / "runs")
    (folder / "hard" / "small").mkdir(parents=True)
    os.link(runs.run / "run.lock", folder / "hard" / "small" / "run.lock")
    names = [str(folder / "runs"), "./x/../runs", f"file://{folder}/runs", "linked", "hard", _bound(folder)]
    (folder / "x").mkdir()
    try:
        others = [runs.start(name) for name in names if name]
        for other in others:
            code, said = other.ended()
            assert code == 1, said
            assert f"is in use by process {first.process.pid}" in said
    finally:
        subprocess.run(["umount", str(folder / "bound")], capture_output=True, check=False)
    assert first.ended()[0] == 0
    assert made(runs.run) == calm


# --- without locks of the kernel ------------------------------------------------------------------------------


def _refuse() -> None:
    refuse_flock(errno.EOPNOTSUPP)


@pytest.mark.long
@pytest.mark.parametrize("lose", [_move, _put_a_copy], ids=lambda way: way.__name__.strip("_"))
def test_without_locks_of_the_kernel_it_is_the_same(runs: Runs, calm: Any, lose: Callable[[Path], None]) -> None:
    require_refusal()
    first = runs.start(prepare=_refuse)
    runs.await_step(12)
    lose(runs.run)
    second = runs.start(prepare=_refuse)
    code, said = first.ended()
    assert code == 1, said
    assert "is no longer this process's" in said
    code, said = second.ended()
    assert code == 0, said
    assert made(runs.run) == calm
