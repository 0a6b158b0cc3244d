"""What guarding a run against damage, loss and strangers costs: a step, a start and a resume, beside the build before.

    python benchmarks/hardening.py --before PATH/.venv/bin/postlude [--quick]

A stage of `recipe: sft` through the local provider, on as many threads as there are cores. It is started, watched for
some seconds, killed with all that is below it, and run again until it makes a new step. The builds take turns, the one
that begins too; of the rounds the median of the ratios is told, with the least and the largest, since both builds of a
round meet the same machine. Without `--before` this build is measured against itself: what is read then is noise.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

OURS = str(Path(sys.executable).parent / "postlude")
SIZE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
ROUNDS, SECONDS, WARM_STEPS, PATIENCE_SECONDS, LONGEST_SECONDS = 5, 12.0, 20, 180.0, 420.0
QUERY = """
    SELECT [{'role': 'user', 'content': 'What comes after ' || n || '?'},
            {'role': 'assistant', 'content': 'It is ' || (n + 1) || '.'}] AS messages FROM range(9999) AS t(n)
"""
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"
EVERY = 50
"""Steps between two checkpoints: each is one of the costs."""
GOAL = 1.02
MEASURES = {
    "start": "to the first step",
    "step": "median",
    "steps": "mean, with checkpoints",
    "resume": "to the first new step",
}


def manifest_of(folder: Path) -> dict[str, Any]:
    stage = {
        "recipe": "sft",
        "model": {"new": {"architecture": "llama", "config": SIZE}},
        "tokenizer": {"bytes": True},
        "data": {"chats": 1.0},
        "steps": 10**6,
        "schedule": {"name": "constant"},
        "batch": {"tokens": 2048, "block": 256},
        "checkpoint": {"every": EVERY},
    }
    data = {"chats": {"source": {"query": QUERY}, "format": "messages", "template": TEMPLATE}}
    return {"name": "run", "run_dir": str(folder), "data": data, "stages": {"sft": stage}}


class Running:
    """A run in a process of its own."""

    def __init__(self, command: str, folder: Path) -> None:
        self._metrics = folder / "run/stages/sft/metrics.jsonl"
        (folder / "run.yaml").write_text(json.dumps(manifest_of(folder)))
        self._command = [command, "run", str(folder / "run.yaml")]

    def start(self) -> None:
        self._process = subprocess.Popen(
            self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )

    def lines(self) -> list[dict[str, Any]]:
        """The lines of its metrics that are whole."""
        text = self._metrics.read_text() if self._metrics.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def begun(self) -> int:
        """How often the stage was taken up."""
        path = self._metrics.parents[2] / "events.jsonl"
        return path.read_text().count('"stage_started"') if path.exists() else 0

    def size(self) -> int:
        return self._metrics.stat().st_size if self._metrics.exists() else 0

    def seconds_until(self, what: Callable[[], bool]) -> float:
        begin = time.perf_counter()
        while not what():
            if self._process.poll() is not None:
                raise SystemExit(f"{' '.join(self._command)} ended with {self._process.returncode}")
            if time.perf_counter() - begin > PATIENCE_SECONDS:
                raise SystemExit(f"{' '.join(self._command)}: nothing within {PATIENCE_SECONDS:g} s")
            time.sleep(0.01)
        return time.perf_counter() - begin

    def kill(self) -> None:
        """Kill it with all that it has started, and wait until all of it is gone."""
        below = psutil.Process(self._process.pid).children(recursive=True)
        for process in [psutil.Process(self._process.pid), *below]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        psutil.wait_procs(below, timeout=30)


def measure(command: str) -> dict[str, float]:
    """Seconds of each measure."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        run = Running(command, Path(place))
        run.start()
        try:
            found = {"start": run.seconds_until(lambda: run.size() > 0)}
            run.seconds_until(lambda: len(run.lines()) >= WARM_STEPS)
            first, begin = len(run.lines()), time.perf_counter()
            time.sleep(SECONDS)
            lines, seconds = run.lines(), time.perf_counter() - begin
            found["step"] = statistics.median(line["seconds"] for line in lines[first:])
            found["steps"] = seconds / (len(lines) - first)
            run.kill()
            begun, begin = run.begun(), time.perf_counter()
            run.start()
            run.seconds_until(lambda: run.begun() > begun)  # it was cut back to the checkpoint before
            cut = run.size()
            run.seconds_until(lambda: run.size() > cut)
            found["resume"] = time.perf_counter() - begin
        finally:
            run.kill()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", metavar="COMMAND", help="`postlude` of the build before")
    parser.add_argument("--quick", action="store_true", help="one round")
    asked = parser.parse_args()
    builds = {"before": asked.before or OURS, "now": OURS}
    measured: dict[str, list[dict[str, float]]] = {build: [] for build in builds}
    begin = time.perf_counter()
    for number in range(1 if asked.quick else ROUNDS):
        for build in sorted(builds, reverse=number % 2 == 1):
            measured[build].append(measure(builds[build]))
            print(build, {name: round(value, 4) for name, value in measured[build][-1].items()}, file=sys.stderr)
        if (time.perf_counter() - begin) * (number + 2) / (number + 1) > LONGEST_SECONDS:
            break  # one more would take too long on this machine
    table = Table(title=f"Seconds, medians of {len(measured['now'])} rounds")
    for column in ("", "what", "before", "now", "now / before", "of the rounds", "at most 2 % more"):
        table.add_column(column, justify="left" if column in ("", "what") else "right")
    for name, what in MEASURES.items():
        old, new = ([each[name] for each in measured[build]] for build in builds)
        ratios = [after / before for before, after in zip(old, new, strict=True)]
        ratio, among = statistics.median(ratios), f"{min(ratios):.3f} to {max(ratios):.3f}"
        figures = f"{statistics.median(old):.4g}", f"{statistics.median(new):.4g}", f"{ratio:.3f}", among
        table.add_row(name, what, *figures, "yes" if ratio <= GOAL else "no")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
