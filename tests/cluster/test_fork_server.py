"""Workers that are forked from a process that has imported what they need are what Python would have started."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from patience import until
from postlude.cluster.fork_server import fork_server, runtime_environment

TELL = """
import json, os, sys, threading
json.dump({"name": __name__, "arguments": sys.argv, "path": sys.path[0], "folder": os.getcwd(), "pid": os.getpid(),
           "mine": os.environ["MINE"], "parent": os.getppid(), "imported": "colorsys" in sys.modules,
           "leads": os.getpgid(0) == os.getpid(),
           "threads": threading.active_count(), "read": sys.stdin.read()}, sys.stdout)
print("beside", file=sys.stderr)
sys.exit(7)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(TELL)
    return path


def started(arguments: Sequence[str], folder: Path) -> subprocess.Popen[bytes]:
    """As Ray starts a worker."""
    command = shlex.split(runtime_environment(has_gpus=False)["runtime_env"]["py_executable"])
    pipe = subprocess.PIPE
    environment = {**os.environ, "MINE": "yes"}
    return subprocess.Popen([*command, *arguments], stdin=pipe, stdout=pipe, stderr=pipe, cwd=folder, env=environment)


def told(process: subprocess.Popen[bytes]) -> tuple[dict, bytes, int]:
    out, beside = process.communicate(b"asked", timeout=60)
    return json.loads(out), beside, process.returncode


def is_gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_worker_is_what_python_would_have_started(script, tmp_path):
    with fork_server(["colorsys"], {}):
        forked = [told(started([str(script), "one", "two"], tmp_path)) for _ in range(2)]
    itself = subprocess.run(
        [sys.executable, str(script), "one", "two"],
        input=b"asked",
        capture_output=True,
        cwd=tmp_path,
        env={**os.environ, "MINE": "yes"},
    )
    assert itself.returncode == 7
    server = {one["parent"] for one, _, _ in forked}
    assert len(server) == 1
    assert os.getpid() not in server
    for one, beside, status in forked:
        assert (beside, status) == (itself.stderr, itself.returncode)
        assert one["imported"]
        assert one["leads"], "who ends its group of processes would end others"
        own = {name: one[name] for name in ("name", "arguments", "path", "folder", "mine", "threads", "read")}
        assert own == {
            "name": "__main__",
            "arguments": [str(script), "one", "two"],
            "path": str(tmp_path),
            "folder": str(tmp_path),
            "mine": "yes",
            "threads": 1,
            "read": "asked",
        }
    assert not psutil.pid_exists(server.pop())


@pytest.mark.parametrize("why", ["nothing listens", "a module cannot be imported"])
def test_where_there_is_none_python_starts_itself(script, tmp_path, why):
    with fork_server(["colorsys"] if why == "nothing listens" else ["no_such_module_anywhere"], {}):
        process = started([str(script)], tmp_path)
        if why == "nothing listens":
            os.kill(told(process)[0]["parent"], signal.SIGKILL)
            process = started([str(script)], tmp_path)
        one, _, status = told(process)
    assert (one["imported"], one["parent"], status) == (False, os.getpid(), 7)


def test_a_worker_ends_with_who_stands_for_it_and_is_told_of(tmp_path):
    wait = tmp_path / "wait.py"
    wait.write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(1000)")
    with fork_server([], {}):
        for who in ("client", "worker", "both", "server"):
            process = started([str(wait)], tmp_path)
            worker = psutil.Process(int(process.stdout.readline()))
            server = worker.parent()
            killed = {"client": [process], "worker": [worker], "both": [worker, process], "server": [server]}
            server.suspend()  # what happens meanwhile it sees at once
            for one in killed[who]:
                one.kill()
            server.resume()
            assert process.wait(60) != 0, who
            until(lambda worker=worker: is_gone(worker))


def test_nothing_of_the_current_folder_is_imported(script, tmp_path, monkeypatch):
    (tmp_path / "colorsys.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    with fork_server(["colorsys"], {}):
        one, _, status = told(started([str(script)], tmp_path.parent))
    assert (one["imported"], status) == (True, 7)


def test_workers_with_gpus_start_themselves():
    with fork_server([], {}):
        assert runtime_environment(has_gpus=True) == {}
    assert runtime_environment(has_gpus=False) == {}


@pytest.mark.long
@pytest.mark.capability(
    "Workers of a local run are forked from one process, and start by themselves where that is gone"
)
def test_a_run_goes_on_without_it(project, calm):
    project.start()
    project.until(lambda: project.step() > 15)
    server = psutil.Process(project.process.pid).children()
    server = [one for one in server if "postlude.cluster.fork_server" in one.cmdline()]
    assert len(server) == 1
    assert {rank.ppid() for rank in project.ranks()} == {server[0].pid}
    server[0].kill()
    project.ended()
    assert project.lines() == calm
    assert len(project.told("group_formed")) == 2
