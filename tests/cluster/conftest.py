"""A run on worker groups, in a process of its own that a test may hit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.hosts import PATIENCE_SECONDS, RayOnHosts
from postlude.runs import Run

EXACT = ("step", "epoch", "progress", "loss", "lr", "grad_norm", "tokens", "trained_tokens", "documents", "skipped")
SIZE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


class Project:
    """A manifest of one small stage on two workers, and the process that runs it."""

    def __init__(self, folder: Path, **compute: Any) -> None:
        self.folder = folder
        chats = folder / "chats.jsonl"
        turns = [[_turn("user", f"Say {n}."), _turn("assistant", f"{n}, {n} and {n}.")] for n in range(300)]
        records = [{"messages": both} for both in turns]
        chats.write_text("".join(json.dumps(record) + "\n" for record in records))
        self.stage: dict[str, Any] = {
            "recipe": "sft",
            "model": {"new": {"architecture": "llama", "config": SIZE}},
            "tokenizer": {"bytes": True},
            "data": {"chats": 1.0},
            "steps": 60,
            "batch": {"tokens": 512, "block": 128},
            "optimizer": {"lr": 1e-2},
            "threads": 1,
            "checkpoint": {"every": 10},
        }
        self.manifest: dict[str, Any] = {
            "name": "small",
            "seed": 3,
            "run_dir": str(folder / "runs"),
            "data": {"chats": {"source": {"path": str(chats)}, "format": "messages"}},
            "compute": {"pools": {"train": {"workers": 2}}, **compute},
            "stages": {"sft": self.stage},
        }
        self.process: subprocess.Popen[str] | None = None

    def called(self, name: str) -> Project:
        """The same project as another run, in a folder of its own, so that neither takes over from the other."""
        self.manifest |= {"name": name, "run_dir": str(self.folder / f"runs-{name}")}
        return self

    # --- the process ----------------------------------------------------------------------------------------

    def write(self) -> str:
        """The manifest's file, as it is now."""
        path = self.folder / "small.yaml"
        path.write_text(json.dumps(self.manifest))
        return str(path)

    def start(
        self, on: RayOnHosts | None = None, assignments: Sequence[str] = (), **environment: str
    ) -> subprocess.Popen[str]:
        """Run it, in a process group of its own; ``on`` the head of a cluster."""
        command = [sys.executable, "-m", "postlude", "run", self.write(), *assignments]
        if on is not None:
            command, environment = on.hosts.command(1, command), {**on.environment, **environment}
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(self.folder), **environment},  # where a test's plugin is
        )
        return self.process

    def ended(self, *codes: int) -> str:
        """What it printed, once it has ended with one of these codes (by default 0)."""
        assert self.process is not None
        out, _ = self.process.communicate(timeout=PATIENCE_SECONDS)
        assert self.process.returncode in (codes or (0,)), out
        return out

    def finished(self) -> list[dict[str, Any]]:
        """Run it to its end; the deterministic fields of its metrics."""
        self.start()
        self.ended()
        return self.lines()

    def until(self, what: Callable[[], Any]) -> Any:
        """Wait for something while the process runs."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not (found := what()):
            assert self.process is not None
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline, self.run.events.read()
            time.sleep(0.002)
        return found

    # --- what it did ----------------------------------------------------------------------------------------

    @property
    def run(self) -> Run:
        return Run(f"{self.manifest['run_dir']}/{self.manifest['name']}")

    def lines(self) -> list[dict[str, Any]]:
        """The deterministic fields of the metrics."""
        lines = self.run.stage("sft").metrics.read()
        assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
        return [{key: line[key] for key in EXACT} for line in lines]

    def step(self) -> int:
        """The last step that has a line."""
        try:
            return len((Path(self.run.stage("sft").uri) / "metrics.jsonl").read_bytes().splitlines())
        except FileNotFoundError:
            return 0

    def told(self, kind: str) -> list[dict[str, Any]]:
        """The events of a kind."""
        return [event for event in self.run.events.read() if event["kind"] == kind]

    def ranks(self, above: list[int] | None = None) -> list[psutil.Process]:
        """The processes of the ranks, in no order, below the controller or below these processes."""
        roots = above or ([self.process.pid] if self.process else [])
        found = []
        for root in roots:
            with suppress(psutil.NoSuchProcess):
                found += [one for one in psutil.Process(root).children(recursive=True) if _is_rank(one)]
        return found

    def kill(self) -> None:
        """Kill the controller and all it has started, if it runs."""
        if self.process is not None and self.process.poll() is None:
            below = psutil.Process(self.process.pid).children(recursive=True)
            self.process.send_signal(signal.SIGKILL)
            for one in below:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
        if self.process is not None and self.process.stdout is not None and not self.process.stdout.closed:
            self.process.communicate()


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _is_rank(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.name().startswith("ray::Worker") and process.status() != psutil.STATUS_ZOMBIE
    return False


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    """A project on Ray that the controller starts itself."""
    made = Project(tmp_path)
    yield made
    made.kill()


@pytest.fixture(scope="session")
def new_project() -> type[Project]:
    """For other settings, and projects that several tests share."""
    return Project


@pytest.fixture(scope="session")
def calm(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The metrics of a project as it is made, undisturbed."""
    return Project(tmp_path_factory.mktemp("calm")).finished()
