"""Training on a busy machine: steps a second alone, beside a busy loop on each core, and of two runs side by side.

    python benchmarks/busy.py [--before COMMAND] [--quick]

Stages of `recipe: sft` through the local provider with as many threads as there are cores, of a tiny model and of a
small one, each watched for some seconds after its first steps. The build before is the command that `--before` names
(`PATH/.venv/bin/postlude` of another checkout); without it this build, with its threads waiting as long as OpenMP lets
them by itself. Both in turn, medians of rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

OURS = str(Path(sys.executable).parent / "postlude")
LONG_WAIT = {"GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"}
"""What libgomp and LLVM's OpenMP do by themselves."""
MODELS = {"tiny": (64, 2), "small": (256, 4)}
"""Hidden size and layers."""
FIRST_STEPS, SECONDS, ROUNDS, LONGEST_START = 3, 20.0, 3, 300.0
PLACES = ("quiet", "beside a busy loop on each core", "two runs, the slower")


def manifest_of(folder: Path, name: str, model: str) -> str:
    hidden, layers = MODELS[model]
    config = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers}
    stage = {
        "recipe": "sft",
        "model": {"new": {"architecture": "llama", "config": {**config, "num_attention_heads": 4}}},
        "tokenizer": {"bytes": True},
        "data": {"texts": 1.0},
        "steps": 10**6,
        "schedule": {"name": "constant"},
        "batch": {"tokens": 2048, "block": 256},
        "checkpoint": {"every": 10**6},
    }
    source = {"query": "SELECT 'What comes after ' || n || '? It is ' || (n + 1) AS text FROM range(9999) AS t(n)"}
    data = {"texts": {"source": source, "format": "text"}}
    return json.dumps({"name": name, "run_dir": str(folder), "data": data, "stages": {"sft": stage}})


def rates(command: str, environment: Mapping[str, str], model: str, runs: int) -> list[float]:
    """The steps a second that each of some runs makes while all of them are at work."""
    with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as stack:
        folder = Path(place)
        names = [f"run{number}" for number in range(runs)]
        for name in names:
            (folder / f"{name}.yaml").write_text(manifest_of(folder, name, model))
            stack.enter_context(started([command, "run", str(folder / f"{name}.yaml")], environment))
        deadline = time.monotonic() + LONGEST_START
        while min(steps(folder, name) for name in names) < FIRST_STEPS:
            if time.monotonic() > deadline:
                raise SystemExit(f"{command}: not {FIRST_STEPS} steps within {LONGEST_START:g} s")
            time.sleep(0.2)
        before, begin = [steps(folder, name) for name in names], time.perf_counter()
        time.sleep(SECONDS)
        after, seconds = [steps(folder, name) for name in names], time.perf_counter() - begin
    return [(last - first) / seconds for first, last in zip(before, after, strict=True)]


def steps(folder: Path, name: str) -> int:
    journal = folder / name / "stages/sft/metrics.jsonl"
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


@contextlib.contextmanager
def started(command: Sequence[str], environment: Mapping[str, str]) -> Iterator[None]:
    """A process, for as long as the context lasts."""
    cleared = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", *LONG_WAIT)
    kept = {name: value for name, value in os.environ.items() if name not in cleared}
    process = subprocess.Popen(
        command, env={**kept, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def busy_loops() -> Iterator[None]:
    """A loop on each core, for as long as the context lasts."""
    with contextlib.ExitStack() as stack:
        for _ in range(len(os.sched_getaffinity(0))):
            stack.enter_context(started([sys.executable, "-c", "while True: pass"], {}))
        yield


def measure(command: str, environment: Mapping[str, str], model: str) -> list[float]:
    """Steps a second in each of the places."""
    quiet = rates(command, environment, model, 1)[0]
    with busy_loops():
        beside = rates(command, environment, model, 1)[0]
    return [quiet, beside, min(rates(command, environment, model, 2))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", metavar="COMMAND", help="`postlude` of the build before")
    parser.add_argument("--quick", action="store_true", help="one round")
    asked = parser.parse_args()
    builds = {"before": (asked.before or OURS, {} if asked.before else LONG_WAIT), "now": (OURS, {})}
    table = Table(title="Steps a second, medians")
    for column in ("model", "where", "before", "now", "now / before", "now / quiet"):
        table.add_column(column, justify="left" if column in ("model", "where") else "right")
    for model in MODELS:
        measured: dict[str, list[list[float]]] = {build: [] for build in builds}
        for _ in range(1 if asked.quick else ROUNDS):
            for build, (command, environment) in builds.items():
                measured[build].append(measure(command, environment, model))
                print(f"{model} {build}: {measured[build][-1]}", file=sys.stderr)
        before, now = ([statistics.median(place) for place in zip(*measured[build], strict=True)] for build in builds)
        for place, old, new in zip(PLACES, before, now, strict=True):
            ratio = f"{new / old:.2f}" if old else "-"
            table.add_row(model, place, f"{old:.2f}", f"{new:.2f}", ratio, f"{new / now[0]:.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
