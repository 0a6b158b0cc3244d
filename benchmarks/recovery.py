"""Seconds from a fault to its detection, and to the next optimiser step.

    python benchmarks/recovery.py

A small model on two workers, a checkpoint every ten steps. A rank is killed on Ray inside the command; then, on hosts
that are network namespaces of this machine (root and iproute2), a host is killed and the link of another is cut, with
an elastic group that goes on with one worker. There is no peer here: the systems read need a person, or the job again.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from cluster import hosts

SIZE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}


class Running:
    """A run in a process of its own."""

    def __init__(self, folder: Path, compute: dict[str, Any], on: hosts.RayOnHosts | None = None) -> None:
        rng = random.Random(0)
        texts = folder / "texts.jsonl"
        texts.write_text("".join(json.dumps({"text": str(rng.random())}) + "\n" for _ in range(500)))
        stage = {
            "recipe": "sft",
            "model": {"new": {"architecture": "llama", "config": SIZE}},
            "tokenizer": {"bytes": True},
            "data": {"texts": 1.0},
            "steps": 10**6,
            "batch": {"tokens": 1024, "block": 256},
            "threads": 1,
            "checkpoint": {"every": 10},
        }
        data = {"texts": {"source": {"path": str(texts)}, "format": "text"}}
        manifest = {"name": "run", "run_dir": str(folder), "data": data, "compute": compute, "stages": {"sft": stage}}
        (folder / "run.yaml").write_text(json.dumps(manifest))
        self._folder = folder / "run"
        command = [sys.executable, "-m", "postlude", "run", str(folder / "run.yaml")]
        if on is not None:
            command = on.hosts.command(1, command)
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, env=on.environment if on else None, start_new_session=True, **quiet)

    def events(self, kind: str) -> list[dict[str, Any]]:
        path = self._folder / "events.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [event for line in lines if (event := json.loads(line))["kind"] == kind]

    def moving(self) -> None:
        """Wait until it has made steps since it was last formed."""
        formed = len(self.events("group_formed"))
        self._until(lambda: len(self.events("stage_started")) >= max(1, formed))
        begin = self._size()
        self._until(lambda: self._size() > begin + 20000)

    def struck(self, fault: Callable[[], None]) -> tuple[float, float]:
        """Seconds from a fault to the event that tells of it, and to the next line of metrics after the recovery."""
        self.moving()
        failures, started = len(self.events("worker_failure")), len(self.events("stage_started"))
        begin = time.time()
        fault()
        self._until(lambda: len(self.events("worker_failure")) > failures)
        found = datetime.fromisoformat(self.events("worker_failure")[-1]["time"]).timestamp() - begin
        self._until(lambda: len(self.events("stage_started")) > started)
        size = self._size()
        self._until(lambda: self._size() > size)
        return found, time.time() - begin

    def _size(self) -> int:
        path = self._folder / "stages" / "sft" / "metrics.jsonl"
        return path.stat().st_size if path.exists() else 0

    def _until(self, what: Callable[[], bool]) -> None:
        while not what():
            if self.process.poll() is not None:
                raise SystemExit("the run ended")
            time.sleep(0.01)

    def close(self) -> None:
        for one in psutil.Process(self.process.pid).children(recursive=True):
            one.kill()
        self.process.kill()
        self.process.wait()


def a_rank() -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as place:
        run = Running(Path(place), {"pools": {"train": {"workers": 2}}})

        def kill() -> None:
            below = psutil.Process(run.process.pid).children(recursive=True)
            os.kill(next(one.pid for one in below if one.name().startswith("ray::Worker")), 9)

        found = run.struck(kill)
        run.close()
        return found


def a_host_and_a_link() -> list[tuple[float, float]]:
    with tempfile.TemporaryDirectory(prefix="b-", dir="/tmp") as place, hosts.Hosts(3) as made:
        cluster = hosts.RayOnHosts(made, Path(place) / "ray", {2: 1, 3: 1})
        compute = {
            "provider": "ray",
            "address": cluster.address,
            "pools": {"train": {"workers": {"min": 1, "max": 2}}},
        }
        (Path(place) / "run").mkdir()
        run = Running(Path(place) / "run", compute, cluster)
        killed = run.struck(lambda: made.kill(3))
        cluster.join(3)
        while len(run.events("group_formed")) < 3:
            time.sleep(0.1)
        cut = run.struck(lambda: made.cut(2))
        run.close()
        cluster.close()
        return [killed, cut]


def main() -> None:
    table = Table(title="From a fault to its detection, and to the next step")
    for column in ("fault", "found after", "next step after"):
        table.add_column(column, justify="left" if column == "fault" else "right")
    found = {"a rank is killed": a_rank()}
    if hosts.can_be_made():
        found |= dict(zip(("a host is killed", "a link is cut"), a_host_and_a_link(), strict=True))
    for fault, (detected, stepped) in found.items():
        table.add_row(fault, f"{detected:.1f} s", f"{stepped:.1f} s")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
