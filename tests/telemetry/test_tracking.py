"""The process of the sinks: it costs the run nothing, is started anew, and ends with the run."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from postlude_example.sink import Lines

from patience import until
from postlude.errors import UserError
from postlude.manifest.component import lookup
from postlude.runs import Run
from postlude.telemetry import events
from postlude.telemetry.sinks.sink import Sink
from postlude.telemetry.tracking import sinks_of, tracking


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(str(tmp_path / "run"))


def begin(run: Run) -> None:
    events.record(run.events, "stage_started", "sft", from_step=0)


def steps(run: Run, first: int, last: int) -> None:
    for step in range(first, last + 1):
        run.stage("sft").metrics.append({"step": step, "loss": 0.5 * step, "seconds": 0.1})
    events.record(run.events, "checkpoint_saved", "sft", step=last, uri="x")


def trackers() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if child.name() == "postlude-sinks"]


@pytest.mark.capability("Trackers are told by a process beside the run, which is started anew where it dies")
def test_a_process_that_is_killed_is_started_anew_and_tells_each_step_once(run: Run, tmp_path: Path) -> None:
    told = tmp_path / "lines.txt"

    def lines() -> list[str]:
        return told.read_text().splitlines() if told.exists() else []

    with tracking(run, {"lines": Lines(path=str(told))}, {"sft": True}):
        begin(run)
        steps(run, 1, 5)
        until(lambda: len(lines()) == 5 and any(Path(run.uri, "sinks").glob("*/*")))
        (process,) = trackers()
        process.kill()
        steps(run, 6, 9)
    assert lines() == [f"sft {step}" for step in range(1, 10)]
    assert trackers() == []
    (alarm,) = [event for event in events.read(run.events) if isinstance(event, events.Alarm)]
    assert "ended with -9" in alarm.reason


@pytest.mark.capability("A run goes on beside a tracker that accepts and never answers, and beside none")
def test_what_a_hung_and_an_absent_server_were_not_told_is_counted(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.create_server(("127.0.0.1", 0)) as gone:
        addresses = [f"http://127.0.0.1:{server.getsockname()[1]}" for server in (silent, gone)]
        gone.close()
        sinks: dict[str, Any] = {
            name: lookup("sinks", "opentelemetry")(endpoint=address, deadline_seconds=1.0)
            for name, address in zip(("hung", "absent"), addresses, strict=True)
        }
        with tracking(run, sinks, {"sft": True}, closing_seconds=3.0):
            begin(run)
            steps(run, 1, 6)
    dropped = {event.sink: event for event in events.read(run.events) if isinstance(event, events.StepsDropped)}
    assert {name: event.count for name, event in dropped.items()} == {"hung": 6, "absent": 6}
    assert "timed out" in dropped["hung"].reason or "longer" in dropped["hung"].reason
    assert "refused" in dropped["absent"].reason


def test_the_process_dies_with_the_one_that_it_works_for(tmp_path: Path) -> None:
    program = (
        "import sys, time\n"
        "from postlude_example.sink import Lines\n"
        "from postlude.runs import Run\n"
        "from postlude.telemetry.tracking import tracking\n"
        "with tracking(Run(sys.argv[1]), {'lines': Lines(path=sys.argv[2])}, {}):\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "run"), str(tmp_path / "lines.txt")]
    with subprocess.Popen(command) as controller:
        mine = psutil.Process(controller.pid)
        until(lambda: any(child.name() == "postlude-sinks" for child in mine.children()))
        (child,) = mine.children()
        os.kill(controller.pid, signal.SIGKILL)
    assert psutil.wait_procs([child], timeout=60)[1] == []


def test_without_sinks_there_is_no_process(run: Run) -> None:
    with tracking(run, {}, {"sft": True}):
        assert trackers() == []


def test_a_package_that_is_missing_is_named_with_its_extra(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("wandb", "mlflow", "trackio", "opentelemetry", "prometheus", "tensorboard"):
        sink = lookup("sinks", name)
        assert issubclass(sink, Sink)
        monkeypatch.setattr(sink, "needs", ("no_such_package",))
        with pytest.raises(UserError, match=rf"'{name}'.*no_such_package.*postlude\[{name}\]"):
            sinks_of([sink()], run.uri)


def test_a_remote_run_needs_a_local_folder_for_what_is_added_to() -> None:
    for name, place in (("tensorboard", "'folder' a local path"), ("mlflow", "'tracking_uri'")):
        with pytest.raises(UserError, match=place):
            sinks_of([lookup("sinks", name)()], "memory://bucket/run")


def test_no_tracker_is_imported_before_it_is_used() -> None:
    program = (
        "import sys\n"
        "from postlude.manifest.component import lookup\n"
        "from postlude.telemetry.tracking import sinks_of\n"
        "names = ('wandb', 'mlflow', 'trackio', 'opentelemetry', 'prometheus', 'tensorboard')\n"
        "sinks_of([lookup('sinks', name)() for name in names], '/tmp/run')\n"
        "known = ('wandb', 'mlflow', 'trackio', 'prometheus_client', 'tensorboard', 'torch', 'google.protobuf')\n"
        "print([name for name in known if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
