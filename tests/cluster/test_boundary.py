"""What holds between a run on this machine and everybody else: its secrets, its servers, and what it imports."""

from __future__ import annotations

import os
import signal
import stat
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = pytest.mark.long

ENDS = "\x1b[2J\x1b]0;title\x07"

PLUGIN = f"""
import os
import sys

from postlude.manifest.component import register
from postlude.data.filters.filter import Filter
from postlude.telemetry.sinks.sink import OpenSink, Sink


def show(who):
    for name in ("HF_TOKEN", "PLAIN", "NAMED", "TYPED", "JUDGE_KEY"):
        print(who, name, os.environ.get(name), {ENDS!r})
        print(who, name, os.environ.get(name), {ENDS!r}, file=sys.stderr)


@register("filters", "leaky")
class Leaky(Filter):
    password: str

    def reason_to_drop(self, record):
        show("worker")
        return None


@register("sinks", "leaky")
class LeakySink(Sink):
    auth_token: str
    mirror: str

    def open(self, run_uri, stage):
        print("opened for", self.mirror)
        return Open(f"{{self.auth_token}} at {{self.mirror}}")


class Open(OpenSink):
    def __init__(self, token):
        self.token = token

    def metrics(self, line):
        show("sink")
        if line["step"] == 3:
            raise RuntimeError(f"a service refuses {{self.token}} {ENDS}")
"""


@dataclass
class Seen:
    """What there was to be seen of a run while it ran, and when it had ended."""

    canaries: dict[str, str]
    said: str
    commands: list[str]
    ray: dict[str, bytes]
    """The files in Ray's folder."""
    others_may: list[str]
    """What others than the owner may enter, on the way to Ray's folder."""
    listening: set[str]
    """Addresses that a process of the run listens at."""
    files: dict[str, bytes]
    """The files of the run directory."""
    imported: list[str]
    """Files of the current folder that were run."""


@pytest.fixture(scope="module")
def seen(new_project: Any, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    folder = tmp_path_factory.mktemp("boundary")
    places = ["HF_TOKEN", "PLAIN", "NAMED", "TYPED", "JUDGE_KEY", "uri", "query", "signature", "filter", "sink"]
    canaries = {place: f"canary-{number}-{place}" for number, place in enumerate(places)}
    (folder / "leaky_plugin").mkdir()
    (folder / "leaky_plugin" / "leaky_plugin.py").write_text(PLUGIN)
    for name in ("torchao", "psutil", "datasets", "peft"):
        (folder / f"{name}.py").write_text(
            f"open({str(folder / 'was-run')!r}, 'a').write({name!r})\nraise ImportError\n"
        )
    project = new_project(
        folder,
        environment={"HF_TOKEN": canaries["HF_TOKEN"], "PLAIN": canaries["PLAIN"], "NAMED": {"from": "environment"}},
    )
    project.manifest["plugins"] = ["leaky_plugin"]
    project.manifest["sinks"] = [{"name": "leaky", "auth_token": canaries["sink"]}]
    project.manifest["data"]["chats"]["filters"] = [{"name": "leaky", "password": canaries["filter"]}]
    address = f"https://user:{canaries['uri']}@host/x?token={canaries['query']}&X-Amz-Signature={canaries['signature']}"
    project.manifest["sinks"][0]["mirror"] = address
    project.stage["steps"] = 400
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as place:
        environment = {
            "TMPDIR": place,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(folder / "leaky_plugin"), os.environ.get("PYTHONPATH")])),
            "NAMED": canaries["NAMED"],
            "JUDGE_KEY": canaries["JUDGE_KEY"],
        }
        # What stands on this command line is not the run's to hide: the processes that it starts are looked at.
        project.start(assignments=[f"compute.environment.TYPED={canaries['TYPED']}"], **environment)
        try:
            project.until(lambda: project.step() > 10)
            tree = psutil.Process(project.process.pid).children(recursive=True)
            commands, listening = [], set()
            for process in tree:
                with suppress(psutil.NoSuchProcess):
                    commands.append(" ".join(process.cmdline()))
                    found = process.net_connections("inet")
                    listening |= {each.laddr.ip for each in found if each.status == psutil.CONN_LISTEN}
            (ray,) = Path(place).glob("postlude-ray-*")
            content = _files(ray)
            others_may = [] if stat.S_IMODE(ray.stat().st_mode) == 0o700 else [str(ray)]
            os.kill(project.process.pid, signal.SIGINT)
            said = project.ended(130)
        finally:
            project.kill()
    started = [command for command in commands if "compute.environment.TYPED" not in command]
    files = _files(Path(project.run.uri))
    imported = [str(path) for path in folder.glob("was-run")]
    return Seen(canaries, said, started, content, others_may, listening, files, imported)


def _files(folder: Path) -> dict[str, bytes]:
    """The content of all files below a folder, and their names."""
    files = {}
    for path in folder.rglob("*"):
        with suppress(OSError):
            files[str(path.relative_to(folder))] = path.read_bytes() if path.is_file() else b""
    return files


@pytest.mark.capability("Secrets are in no file, log, event, error or command line of a run, nor in Ray's folder")
def test_no_canary_is_found_anywhere(seen: Seen) -> None:
    assert len(seen.commands) > 5
    assert len(seen.ray) > 10
    assert any(name.endswith("manifest.lock.yaml") for name in seen.files)
    for place, canary in seen.canaries.items():
        assert canary not in seen.said, place
        assert not [command for command in seen.commands if canary in command], place
        for files in (seen.ray, seen.files):
            found = [name for name, content in files.items() if canary.encode() in content or canary in name]
            assert found == [], place
    for name in ("HF_TOKEN", "PLAIN", "NAMED", "TYPED"):
        for who in ("worker", "sink"):  # it did reach them, and was printed there
            assert f"{who} {name} <{name}>" in seen.said
    assert b"a service refuses <auth_token> at https://host/x" in seen.files["events.jsonl"]


def test_a_digest_tells_that_a_value_has_changed(seen: Seen) -> None:
    locked = seen.files["manifest.lock.yaml"].decode()
    assert "HF_TOKEN: sha256:" in locked
    assert "from: environment" in locked


def test_what_workers_print_does_not_act_on_the_terminal(seen: Seen) -> None:
    assert "\x1b[2J" not in seen.said
    assert "\\x1b[2J\\x1b]0;title\\x07" in seen.said


@pytest.mark.capability(
    "With provider: local nobody else enters Ray's folder, and its servers listen on loopback alone"
)
def test_ray_is_for_this_run_alone(seen: Seen) -> None:
    assert seen.others_may == []
    assert seen.listening
    assert seen.listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


@pytest.mark.capability("Workers import what is installed, not what lies in the current folder")
def test_nothing_of_the_current_folder_is_imported(seen: Seen) -> None:
    assert seen.imported == []
