"""Receivers get each alarm once; one that fails or hangs keeps nobody up, and what it missed is counted."""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from postlude.manifest.alarms import Receiver
from postlude.runs import Run
from postlude.telemetry import events, notify
from postlude.telemetry.notify import notifying


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(str(tmp_path / "run"))


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    """Keeps what is posted to it under ``posted``; refuses it below ``/refuses``."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(500 if self.path == "/refuses" else 204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    posted: list[dict[str, object]] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.posted = posted  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def tell(run: Run, *names: str) -> None:
    for name in names:
        events.record(run.events, "alarm", "sft", what=name, reason="it is so", step=7)


def dropped(run: Run) -> list[tuple[str, int, str]]:
    return [
        (event.receiver, event.count, event.reason)
        for event in events.read(run.events)
        if isinstance(event, events.NotificationsDropped)
    ]


@pytest.mark.capability("A webhook and a command are told of alarms; one that hangs costs the run nothing")
def test_a_webhook_and_a_command_get_each_alarm_once(run: Run, server: ThreadingHTTPServer, tmp_path: Path) -> None:
    tell(run, "before")
    program = "import pathlib, sys; file = pathlib.Path(sys.argv[1]).open('a'); print(sys.stdin.read(), file=file)"
    written = tmp_path / "written"
    receivers = [
        Receiver(webhook=f"http://127.0.0.1:{server.server_port}/"),
        Receiver(command=[sys.executable, "-c", program, str(written)]),
    ]
    with notifying(run, receivers):
        tell(run, "first", "second")
        events.record(run.events, "stage_started", "sft", from_step=0)
    sent = [json.loads(line) for line in written.read_text().splitlines() if line]
    assert sent == server.posted  # type: ignore[attr-defined]
    assert [(letter["run"], letter["stage"], letter["what"], letter["step"]) for letter in sent] == [
        ("run", "sft", "first", 7),
        ("run", "sft", "second", 7),
    ]
    assert dropped(run) == []


def test_what_a_receiver_refuses_is_counted(run: Run, server: ThreadingHTTPServer) -> None:
    receivers = [
        Receiver(webhook=f"http://127.0.0.1:{server.server_port}/refuses"),
        Receiver(command=[sys.executable, "-c", "raise SystemExit(3)"]),
        Receiver(command=["/nowhere/is/such/a/program"]),
    ]
    with notifying(run, receivers):
        tell(run, "first")
    (refused, failed, missing) = dropped(run)
    assert refused[:2] == ("127.0.0.1", 1)
    assert "500" in refused[2]
    assert failed[1:] == (1, "it ended with exit code 3")
    assert "No such file" in missing[2]


def test_one_that_hangs_is_given_up_and_keeps_no_other(run: Run, server: ThreadingHTTPServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it accepts, and never answers
        hangs = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        receivers = [
            Receiver(webhook=hangs, deadline_seconds=0.2),
            Receiver(command=[sys.executable, "-c", "import time; time.sleep(60)"], deadline_seconds=0.2),
            Receiver(webhook=f"http://127.0.0.1:{server.server_port}/"),
        ]
        with notifying(run, receivers):
            tell(run, "first", "second", "third")
    assert [letter["what"] for letter in server.posted] == ["first", "second", "third"]  # type: ignore[attr-defined]
    counts = {receiver: 0 for receiver, *_ in dropped(run)}
    for receiver, count, _ in dropped(run):
        counts[receiver] += count
    assert counts == {"127.0.0.1": 3, sys.executable: 3}


def test_no_more_than_so_many_wait(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notify, "MOST_WAITING", 2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hangs = Receiver(webhook=f"http://127.0.0.1:{silent.getsockname()[1]}/", deadline_seconds=0.5)
        with notifying(run, [hangs]):
            tell(run, *map(str, range(10)))
    assert sum(count for _, count, _ in dropped(run)) == 10


def test_without_receivers_there_is_no_thread(run: Run) -> None:
    before = threading.active_count()
    with notifying(run, None):
        assert threading.active_count() == before
