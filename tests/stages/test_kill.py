"""Work that was killed goes on where it stopped, and ends bitwise as if it had not been."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

MEASURED = ("step", "progress", "tokens", "prompts", "completions", "records", "completion_tokens", "stopped", "reward")


def start(manifest: str, inline: bool = True) -> subprocess.Popen:
    command = [sys.executable, "-m", "postlude", "run", manifest, *(["--inline"] if inline else [])]
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def prepare(project, name: str, workers: int) -> str:
    # A folder each: else one run takes over what another made.
    place = str(project.folder / f"runs-{name}")
    project.manifest |= {"name": name, "run_dir": place, "compute": {"pools": {"train": {"workers": workers}}}}
    judge = {"model": {"path": project.models["judge"]}}
    match = {"function": {"name": "regex", "pattern": "[a-m]"}}
    project.stages["answers"] = project.generate(
        samples=4, concurrency=8, max_tokens=160, reward=[judge, match], keep={"top": 2}
    )
    return project.write()


def portions(project) -> set[str]:
    folder = Path(project.directory.stage("answers").uri) / "portions"
    return {path.name for path in folder.glob("0*.jsonl")} if folder.exists() else set()


def metrics(project) -> list[dict]:
    return [{key: line.get(key) for key in MEASURED} for line in project.directory.stage("answers").metrics.read()]


def finished(process: subprocess.Popen) -> None:
    output, _ = process.communicate()
    assert process.returncode == 0, output.decode()


@pytest.fixture
def long_work(project):
    records = [
        {"messages": [{"role": "user", "content": f"{n} " * (n % 7 + 1)}, {"role": "assistant", "content": str(n)}]}
        for n in range(60)
    ]
    project.data["asked"] = project.written("asked", records)
    return project


@pytest.mark.long
@pytest.mark.capability("Stages that do not train go on after SIGKILL, bitwise as if undisturbed")
@pytest.mark.parametrize(("workers", "kills"), [(1, 4), (2, 1)])
def test_killed_work_ends_as_if_undisturbed(long_work, workers, kills):
    inline = workers == 1
    finished(start(prepare(long_work, "calm", workers), inline))
    calm, lines = (long_work.artifact("answers") / "data.jsonl").read_bytes(), metrics(long_work)
    assert len(lines) == 30
    manifest, rng, hits = prepare(long_work, "shaken", workers), random.Random(workers), 0
    while True:
        before = portions(long_work)
        process = start(manifest, inline)
        if hits < kills:
            aim = len(before) + rng.randrange(1, 6)
            while process.poll() is None and len(portions(long_work)) < aim:
                time.sleep(0.002)
            time.sleep(rng.random() * 0.05)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                hits += 1
        output, _ = process.communicate()
        assert before <= portions(long_work) or process.returncode == 0  # nothing that was done is done again
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, output.decode()
    assert hits >= (kills + 1) // 2
    assert (long_work.artifact("answers") / "data.jsonl").read_bytes() == calm
    assert metrics(long_work) == lines


@pytest.mark.long
def test_interrupted_work_exits_130_and_goes_on(long_work):
    manifest = prepare(long_work, "stopped", 1)
    process = start(manifest)
    while process.poll() is None and len(portions(long_work)) < 2:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == 130, output.decode()
    done = portions(long_work)
    assert 2 <= len(done) < 30
    assert len(metrics(long_work)) == len(done)
    finished(start(manifest))
    assert [line["step"] for line in metrics(long_work)] == list(range(1, 31))
    assert not portions(long_work)
    started = [e for e in long_work.directory.events.read() if e["kind"] == "stage_started"]
    assert [event["from_step"] for event in started] == [0, len(done)]


def test_a_kill_between_the_artifact_and_the_end_is_no_new_work(project):
    project.stages["answers"] = project.generate()
    assert project.run() == 0
    made = (project.artifact("answers") / "data.jsonl").stat().st_mtime_ns
    project.directory.stage("answers").enter("running")
    assert project.run() == 0
    assert (project.artifact("answers") / "data.jsonl").stat().st_mtime_ns == made
    assert project.directory.stage("answers").status().state == "done"


def test_a_line_of_metrics_that_a_kill_cut_off_is_written_again(project, monkeypatch):
    """A portion is committed before its line is written."""
    from postlude.telemetry.recorder import Recorder

    project.stages["answers"] = project.generate(concurrency=4)
    tell = Recorder.metrics

    def until_the_second(self, line):
        if line["step"] == 2:
            raise RuntimeError("cut off")
        tell(self, line)

    monkeypatch.setattr(Recorder, "metrics", until_the_second)
    with pytest.raises(RuntimeError, match="cut off"):
        project.run()
    monkeypatch.setattr(Recorder, "metrics", tell)
    assert project.run() == 0
    assert [line["step"] for line in metrics(project)] == [1, 2, 3, 4, 5]
    assert sum(json.loads(str(line["completions"])) for line in metrics(project)) == 20


def test_what_is_committed_is_not_done_again(project, monkeypatch):
    from postlude.stages.generation import Generation

    project.stages["answers"] = project.generate(concurrency=4)
    do, asked = Generation.do, []

    def counted(self, portion, tell):
        asked.append(portion)
        if asked == [0, 1, 2, 3]:
            raise RuntimeError("stopped here")
        return do(self, portion, tell)

    monkeypatch.setattr(Generation, "do", counted)
    with pytest.raises(RuntimeError, match="stopped here"):
        project.run()
    assert project.run() == 0
    assert asked == [0, 1, 2, 3, 3, 4]
    assert len(project.records("answers")) == 20
