"""Training on a busy machine: steps a second alone, beside a busy loop on each core, and of two runs side by side.

    python benchmarks/busy.py [--before COMMAND] [--rounds N]

Stages of `recipe: sft` in one process each, with as many threads as there are cores, of a tiny and of a small model.
The build before is the command that `--before` names (`PATH/.venv/bin/postlude` of another checkout); without it this
build, with its threads waiting as long as OpenMP lets them by itself. All runs are begun first and stopped; then each
goes on for some seconds in turn, round after round, so that what else the machine does meets all of them. A ratio is
the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

OURS = str(Path(sys.executable).parent / "postlude")
LONG_WAIT = {"GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"}
"""What libgomp and LLVM's OpenMP do by themselves."""
MODELS = {"tiny": (64, 2), "small": (256, 4)}
"""Hidden size and layers."""
FIRST_STEPS, SETTLE_SECONDS, SECONDS, LONGEST_START = 3, 2.0, 8.0, 300.0
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


@dataclass
class Run:
    """A run that trains while it is let."""

    journal: Path
    process: subprocess.Popen[bytes]

    def let(self, goes_on: bool) -> None:
        self.process.send_signal(signal.SIGCONT if goes_on else signal.SIGSTOP)

    def steps(self) -> float:
        """How many steps were made; those that are being made are seen at their end."""
        return self.journal.read_bytes().count(b"\n") if self.journal.exists() else 0


@contextlib.contextmanager
def begun(folder: Path, name: str, command: str, environment: Mapping[str, str], model: str) -> Iterator[Run]:
    """A run after its first steps, stopped."""
    (folder / f"{name}.yaml").write_text(manifest_of(folder, name, model))
    with started([command, "run", str(folder / f"{name}.yaml"), "--inline"], environment) as process:
        run = Run(folder / name / "stages/sft/metrics.jsonl", process)
        deadline = time.monotonic() + LONGEST_START
        while run.steps() < FIRST_STEPS:
            if time.monotonic() > deadline or process.poll() is not None:
                raise SystemExit(f"{command}: not {FIRST_STEPS} steps within {LONGEST_START:g} s")
            time.sleep(0.2)
        run.let(False)
        yield run


@contextlib.contextmanager
def started(command: Sequence[str], environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process, for as long as the context lasts."""
    cleared = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", *LONG_WAIT)
    kept = {name: value for name, value in os.environ.items() if name not in cleared}
    process = subprocess.Popen(
        command, env={**kept, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield process
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


def rate(runs: Sequence[Run]) -> float:
    """The steps a second of the slowest of some runs while all of them are at work."""
    for run in runs:
        run.let(True)
    time.sleep(SETTLE_SECONDS)
    measured = [measure(run) for run in runs] if len(runs) == 1 else together(runs)
    for run in runs:
        run.let(False)
    return min(measured)


def measure(run: Run) -> float:
    """From the end of a step to the end of a step."""
    first, begin = next_step(run)
    time.sleep(SECONDS)
    last, end = next_step(run)
    return (last - first) / (end - begin)


def next_step(run: Run) -> tuple[float, float]:
    before = run.steps()
    while (steps := run.steps()) == before:
        time.sleep(0.002)
    return steps, time.perf_counter()


def together(runs: Sequence[Run]) -> list[float]:
    before, begin = [run.steps() for run in runs], time.perf_counter()
    time.sleep(2 * SECONDS)
    seconds = time.perf_counter() - begin
    return [(run.steps() - steps) / seconds for run, steps in zip(runs, before, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", metavar="COMMAND", help="`postlude` of the build before")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    builds = {"before": (asked.before or OURS, {} if asked.before else LONG_WAIT), "now": (OURS, {})}
    table = Table(title="Steps a second, medians")
    for column in ("model", "where", "before", "now", "now / before", "now / quiet"):
        table.add_column(column, justify="left" if column in ("model", "where") else "right")
    for model in MODELS:
        rates = {place: {build: [] for build in builds} for place in PLACES}
        with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as stack:
            pairs = {
                build: [stack.enter_context(begun(Path(place), f"{build}{n}", *how, model)) for n in range(2)]
                for build, how in builds.items()
            }
            for _ in range(asked.rounds):
                for build, pair in pairs.items():
                    rates[PLACES[0]][build].append(rate(pair[:1]))
            for _ in range(asked.rounds):
                for build, pair in pairs.items():
                    with busy_loops():
                        rates[PLACES[1]][build].append(rate(pair[:1]))
                    rates[PLACES[2]][build].append(rate(pair))
        quiet = statistics.median(rates[PLACES[0]]["now"])
        for where, measured in rates.items():
            old, new = (statistics.median(measured[build]) for build in builds)
            ratio = statistics.median(b / a if a else float("inf") for a, b in zip(*measured.values(), strict=True))
            table.add_row(model, where, f"{old:.2f}", f"{new:.2f}", f"{ratio:.2f}", f"{new / quiet:.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
