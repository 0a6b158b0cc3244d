"""What trackers cost the steps of a run: with a server that never answers, with none, with a collector that works.

    python benchmarks/trackers.py [--rounds 3] [--steps 600]

A small model on this machine's CPU, in rounds: no sinks, a hung server, an absent one, a collector, and no sinks again
at the end. Each run is compared with the mean of the two without sinks around it, by the median of its steps' seconds;
of the rounds the median is told, and the least and the greatest. How far the runs without sinks are from each other is
what the machine does by itself.
"""

from __future__ import annotations

import argparse
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
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

FIRST = 100
"""The first step that counts: the process of the sinks begins beside those before."""
SIZE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}


class Collector(BaseHTTPRequestHandler):
    """Takes all and keeps nothing."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def step_seconds(folder: Path, name: str, steps: int, sinks: list[dict[str, Any]]) -> float:
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
                "steps": steps,
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    chosen = parser.parse_args()
    collector = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as place, socket.create_server(("127.0.0.1", 0)) as silent:
        with socket.create_server(("127.0.0.1", 0)) as gone:
            absent = gone.getsockname()[1]

        def at(port: int) -> list[dict[str, Any]]:
            return [
                {"name": "opentelemetry", "endpoint": f"http://127.0.0.1:{port}"},
                {"name": "mlflow", "tracking_uri": f"http://127.0.0.1:{port}"},
            ]

        kinds = {
            "a server that never answers": at(silent.getsockname()[1]),
            "no server": at(absent),
            "a collector that works": at(collector.server_port)[:1],
        }
        without: list[float] = []
        measured: dict[str, list[float]] = {name: [] for name in kinds}
        for number in range(chosen.rounds):
            for name, sinks in {"none": [], **kinds}.items():
                run = f"{name.replace(' ', '-')}-{number}"
                (without if name == "none" else measured[name]).append(
                    step_seconds(Path(place), run, chosen.steps, sinks)
                )
                print(f"{name}, round {number + 1}", flush=True)
        without.append(step_seconds(Path(place), "none-last", chosen.steps, []))
    bases = [(one + other) / 2 for one, other in pairwise(without)]
    table = Table("trackers", "milliseconds a step", "ratio", "least", "greatest")
    rows = {name: [each / base for each, base in zip(of, bases, strict=True)] for name, of in measured.items()}
    rows["none, one round to the next"] = [other / one for one, other in pairwise(without)]
    for name, ratios in rows.items():
        seconds = statistics.median(measured.get(name, without))
        told = (statistics.median(ratios), min(ratios), max(ratios))
        table.add_row(name, f"{1000 * seconds:.3f}", *(f"{ratio:.3f}" for ratio in told))
    Console().print(table)


if __name__ == "__main__":
    main()
