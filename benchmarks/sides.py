"""Two sides of a training benchmark, ours and a peer's: each measurement in a process of its own, taking turns.

A script defines its sides as functions of a folder with what was prepared, a number of steps and a vocabulary, which
return tokens (or pairs) a second and the growth of the peak resident set in bytes, and calls :func:`main`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

THREADS = 2
WARM_UP = 2
"""Steps that are not counted."""

Side = Callable[[Path, int, int], dict[str, float]]


@dataclass(frozen=True)
class Case:
    """What both sides do."""

    vocabulary: int
    steps: int
    rounds: int


class Growth:
    """The growth of the peak resident set from when this is made, once everything is imported."""

    def __init__(self) -> None:
        from postlude.telemetry.hardware import reset_peak, resident_bytes

        self._base = resident_bytes()
        reset_peak()

    def bytes(self) -> int:
        from postlude.telemetry.hardware import peak_resident_bytes

        return peak_resident_bytes() - self._base


def our_run(folder: Path, stages: Mapping[str, Any], data: Mapping[str, Any], timed: str) -> dict[str, float]:
    """Run the stages of a manifest in this process; the units a second of one of them, by its documents or tokens."""
    import torch  # noqa: F401
    import transformers  # noqa: F401

    from postlude.workflow.run import run

    manifest = {"name": "benchmark", "run_dir": str(folder / "runs"), "data": data, "stages": stages}
    path = folder / "benchmark.yaml"
    path.write_text(json.dumps(manifest))
    growth = Growth()
    if run(str(path), [], inline=True) != 0:
        raise SystemExit("the run failed")
    lines = [json.loads(line) for line in (folder / f"runs/benchmark/stages/{timed}/metrics.jsonl").open()]
    counted = lines[WARM_UP:]
    return {
        "rate": statistics.median(line["tokens"] / line["seconds"] for line in counted),
        "seconds": statistics.median(line["seconds"] for line in counted),
        "growth": growth.bytes(),
    }


def clock() -> Any:
    """A callback of transformers' Trainer that notes when each step ends, as ``ends``."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *args: Any, **keywords: Any) -> None:
            self.ends.append(time.perf_counter())

        def seconds(self) -> float:
            """The median of the steps that are counted."""
            return statistics.median(b - a for a, b in zip(self.ends[WARM_UP - 1 :], self.ends[WARM_UP:]))

    return Clock()


def main(script: str, title: str, peer: str, sides: Mapping[str, Side], prepare: Callable[[Path], None], *cases: Case):
    """Measure every case, or as one of the sides; ``sides`` has the peer's first, under ``peer``, then ours."""
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--vocabulary", type=int, help="only the case with this vocabulary")
    for hidden in ("--side", "--folder", "--steps"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.side:
        print(json.dumps(sides[asked.side](Path(asked.folder), int(asked.steps), asked.vocabulary)))
        return
    table = Table(title=title)
    for column in ("vocabulary", f"{peer} s/step", "Postlude s/step", "speed", f"{peer} MiB", "Postlude MiB", "memory"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as place:
        prepare(Path(place))
        for case in cases:
            if asked.vocabulary not in (None, case.vocabulary):
                continue
            found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
            for _ in range(1 if asked.quick else case.rounds):
                for side, runs in found.items():
                    runs.append(_measure(script, side, Path(place), case))
                    print(f"{case.vocabulary:,} {side}: {runs[-1]}", file=sys.stderr)
            theirs, ours = ([_median(runs, key) for key in ("rate", "seconds", "growth")] for runs in found.values())
            table.add_row(
                f"{case.vocabulary:,}",
                f"{theirs[1]:.2f}",
                f"{ours[1]:.2f}",
                f"{ours[0] / theirs[0]:.2f} times",
                f"{theirs[2] / 2**20:,.0f}",
                f"{ours[2] / 2**20:,.0f}",
                f"{ours[2] / theirs[2]:.2f} times",
            )
    Console(width=110).print(table)


def _median(runs: list[dict[str, float]], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def _measure(script: str, side: str, folder: Path, case: Case) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as out:
        for item in folder.iterdir():
            os.symlink(item, Path(out) / item.name)
        command = [sys.executable, script, "--side", side, "--folder", out]
        command += ["--steps", str(case.steps), "--vocabulary", str(case.vocabulary)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


# --- what they are given ------------------------------------------------------------------------------------


class Words:
    """Texts of random words, the same each time, and a tokenizer of 8,192 entries made of them."""

    def __init__(self, rng: Any) -> None:
        self._rng = rng
        self._words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(6000)]

    def said(self, words: int) -> str:
        return " ".join(self._rng.choices(self._words, k=words))

    def save_tokenizer(self, folder: Path) -> None:
        from postlude.data.tokenizer import train_tokenizer
        from postlude.manifest.schema import TrainTokenizer

        texts = (self.said(100) for _ in range(2000))
        train_tokenizer(TrainTokenizer(kind="bpe", vocabulary=8192), texts).save_pretrained(folder)
