"""What trackers cost the steps of a run: with a server that never answers, with none, with a collector that works.

    python benchmarks/trackers.py

A small model on this machine's CPU, in this order: no sinks, a hung server, an absent one, a collector, no sinks again.
Each prints the ratio of the median of its steps' seconds to that of the runs without sinks, which are compared with
each other, too: their difference is what the machine does by itself.
"""

from __future__ import annotations

import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

STEPS, FIRST = 600, 100
"""Steps of a run, and the first that counts: the process of the sinks begins beside those before."""
SIZE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}


class Collector(BaseHTTPRequestHandler):
    """Takes all and keeps nothing."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def step_seconds(folder: Path, name: str, sinks: list[dict[str, Any]]) -> float:
    """The median of a run's steps."""
    texts = folder / "texts.jsonl"
    if not texts.exists():
        rng = random.Random(0)
        texts.write_text("".join(json.dumps({"text": str(rng.random())}) + "\n" for _ in range(500)))
    manifest = {
        "name": name,
        "run_dir": str(folder / name),
        "data": {"texts": {"source": {"path": str(texts)}, "format": "text"}},
        "sinks": sinks,
        "stages": {
            "train": {
                "recipe": "sft",
                "model": {"new": {"architecture": "llama", "config": SIZE}},
                "tokenizer": {"bytes": True},
                "data": {"texts": 1.0},
                "steps": STEPS,
                "batch": {"tokens": 1024, "block": 256},
                "threads": 1,
                "checkpoint": {"every": 50},
            }
        },
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(manifest))
    command = [sys.executable, "-P", "-m", "postlude", "run", str(path), "--inline"]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    lines = (folder / name / name / "stages/train/metrics.jsonl").read_text().splitlines()
    return statistics.median(json.loads(line)["seconds"] for line in lines[FIRST:])


def main() -> None:
    collector = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as place, socket.create_server(("127.0.0.1", 0)) as silent:
        folder = Path(place)
        with socket.create_server(("127.0.0.1", 0)) as gone:
            absent = gone.getsockname()[1]

        def at(port: int) -> list[dict[str, Any]]:
            return [
                {"name": "opentelemetry", "endpoint": f"http://127.0.0.1:{port}"},
                {"name": "mlflow", "tracking_uri": f"http://127.0.0.1:{port}"},
            ]

        first = step_seconds(folder, "first", [])
        measured = {
            "a server that never answers": step_seconds(folder, "hung", at(silent.getsockname()[1])),
            "no server": step_seconds(folder, "absent", at(absent)),
            "a collector that works": step_seconds(folder, "works", at(collector.server_port)[:1]),
        }
        last = step_seconds(folder, "last", [])
    base = (first + last) / 2
    table = Table("trackers", "milliseconds a step", "ratio")
    for name, seconds in {"none": first, **measured, "none, again": last}.items():
        table.add_row(name, f"{1000 * seconds:.3f}", f"{seconds / base:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
