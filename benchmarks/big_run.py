"""Writes the directory of a run that never was, as large as runs get, to see how the page does with it: one stage of
1,000,000 steps with 50 metrics, 64 workers, 10 million losses of examples and 200,000 rollouts.

python benchmarks/big_run.py FOLDER [--share 0.01]

Parts, sealed lines and the lock are written by the project's own code, long journals by DuckDB in their form. A spike
of the loss stands at one step (:data:`SPIKE`).
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa

from postlude import storage
from postlude.manifest.load import load
from postlude.manifest.lock import dump_lock, lock
from postlude.runs import Run, Stage, examples, tokens
from postlude.storage import exact_json
from postlude.storage.commits import checksum

STEPS, METRICS, WORKERS, LOSSES, ROLLOUTS = 1_000_000, 50, 64, 10_000_000, 200_000
EXAMPLES, GROUP, READINGS = 500_000, 8, 500
SPIKE = 0.618
"""Where in the run the loss has a spike of one step, and how high it is."""
SPIKE_LOSS = 1000.0
BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
MANIFEST = b"""
name: big
data:
  math: {source: {path: math.jsonl}, format: messages}
  code: {source: {path: code.jsonl}, format: messages}
stages:
  policy:
    recipe: grpo
    model: {path: model}
    data: {math: 0.7, code: 0.3}
    steps: 1000000
    reward: [{function: exact_match}]
"""


def metrics(stage: Stage, steps: int) -> None:
    """The metrics, a line a step."""
    spike = int(SPIKE * steps)
    columns = {
        "loss": f"CASE WHEN i = {spike} THEN {SPIKE_LOSS} ELSE 3 * exp(-4.0 * i / {steps}) + 0.2 * random() END",
        "lr": f"1e-4 * (1 - i / {steps + 1})",
        "grad_norm": "0.5 + random()",
        "progress": f"i / {steps}",
        "tokens_per_second": "50000 + 2000 * random()",
        "mfu": "0.4 + 0.02 * random()",
        "reward": f"i / {steps} + 0.3 * random()",
        "entropy": f"2 - i / {steps} + 0.1 * random()",
        "seconds": "1 + 0.1 * random()",
        "seconds_forward": "0.3 + 0.1 * random()",
        "seconds_backward": "0.6 + 0.1 * random()",
    }
    columns |= {f"part_{n:02d}": f"sin(i * {n} / 1e5) + random()" for n in range(METRICS - len(columns) - 2)}
    told = ", ".join(f"CAST({expression} AS FLOAT) AS {name}" for name, expression in columns.items())
    path = storage.local_path(stage.metrics.uri)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    duckdb.sql(
        f"COPY (SELECT i AS step, {told}, 60000 + i % 5000 AS tokens, CAST(1e9 + i AS BIGINT) AS memory_bytes "
        f"FROM range(1, {steps + 1}) t(i)) TO '{path}' (FORMAT json)"
    )


def losses(stage: Stage, rows: int, steps: int) -> None:
    """The losses by example, in whole parts of all workers, each example in every epoch."""
    random = np.random.default_rng(0)
    ids = pa.array([f"{'math' if n % 3 else 'code'}:{n * 2654435761 % 2**64:016x}" for n in range(EXAMPLES)])
    sources = pa.array(["math" if n % 3 else "code" for n in range(EXAMPLES)])
    size = examples.ROWS_OF_A_PART
    parts = max(rows // size, 1)
    for number in range(parts):
        # Parts of one rank follow one another; every example comes once before it comes again.
        rank, turn = number % WORKERS, number // WORKERS
        span = steps * WORKERS // (parts + WORKERS)
        step = np.sort(random.integers(turn * span + 1, (turn + 1) * span + 1, size))
        which = (np.arange(number * size, (number + 1) * size) * 7919) % EXAMPLES
        count = random.integers(20, 400, size)
        by_token = 3 * np.exp(-3.0 * step / steps) + random.random(size) + (which % 1000 == 7) * step / steps * 2
        columns = [step, which // EXAMPLES, ids.take(pa.array(which)), sources.take(pa.array(which))]
        table = pa.table([*columns, by_token * count, count], schema=examples._schema())
        examples._write(stage.examples, examples._Part.called(rank, int(step[0]), int(step[-1])), table)


def rollouts(stage: Stage, lines: int, steps: int) -> None:
    """The rollouts, in groups; of some the tokens are kept."""
    random = np.random.default_rng(1)
    words = ["so", "the", "sum", "of", "both", "is", "seven", "<b>&", "1 + 1", "therefore", "\u00e9t\u00e9"]
    path = Path(storage.local_path(stage.rollouts.uri))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="ascii") as file:
        for issue in range(lines // GROUP):
            step = 1 + issue * steps // (lines // GROUP)
            texts = [" ".join(random.choice(words, 120)) for _ in range(GROUP)]
            rewards = random.integers(0, 2, GROUP) if issue % 5 else np.ones(GROUP, int)
            dropped = issue % 50 == 0
            for sample, (text, reward) in enumerate(zip(texts, rewards.tolist(), strict=True)):
                line = {
                    "prompt_id": f"math:{issue % 5000:016x}",
                    "issue": issue,
                    "epoch": issue // 5000,
                    "sample": sample,
                    "prompt": [{"role": "user", "content": f"What is {issue} and one more? Say why."}],
                    "completion": text,
                    "ended": "stop",
                    "tokens": 120,
                    "versions": [max(step - 2, 0), max(step - 1, 0)],
                    "reward": float(reward),
                    "rewards": {"contains": float(reward), "length": 0.0},
                    "outcome": "dropped" if dropped else "trained",
                    "step": step,
                }
                line |= {"reason": "all samples have the same reward"} if dropped else {"advantage": reward - 0.5}
                if issue % 64 == 0:
                    logp = -random.random(120)
                    drawn = logp + random.normal(0, 0.05, 120), random.random(120)
                    pieces = [f" {word}" for word in text.split()][:120]
                    pieces += [" so"] * (120 - len(pieces))
                    sampled = [False] * 9 + [True] * 120
                    line |= tokens.told([" asked"] * 9 + pieces, sampled, [max(step - 1, 0)] * 120, logp, *drawn)
                file.write(json.dumps(line) + "\n")


def readings(stage: Stage, steps: int) -> None:
    """The readings of every worker, one of which is slow."""
    random = np.random.default_rng(2)
    with Path(storage.local_path(stage.readings.uri)).open("w", encoding="ascii") as file:
        for number in range(READINGS):
            moment = BEGIN + timedelta(seconds=number * steps / READINGS)
            for rank in range(WORKERS):
                forward = (0.3 if rank != 13 else 0.7) + 0.05 * random.random()
                seconds = {
                    "seconds": 1.4,
                    "seconds_forward": forward,
                    "seconds_backward": 0.5,
                    "seconds_optimizer": 0.1,
                }
                line = {
                    "time": moment.isoformat(timespec="milliseconds"),
                    "rank": rank,
                    "host": f"host-{rank // 8}",
                    "round_trip_seconds": 0.001 + 0.001 * random.random(),
                    "step": number * steps // READINGS,
                    "resident_bytes": 2**33 + number * 2**18,
                    "device_bytes": 2**35 + int(2**30 * random.random()),
                    "seconds": seconds,
                    "link": {"rank_round_trip_seconds": 2e-5, "collective_bytes_per_second": 2e10},
                }
                file.write(exact_json.dump({**line, "sha256": checksum(line)}) + "\n")


def make(folder: str, share: float = 1.0) -> Run:
    """The run, written into ``folder/big``; a ``share`` of it."""
    run = Run(storage.join(folder, "big"))
    run.write_manifest_lock(dump_lock(lock(load(MANIFEST, "big.yaml"))))
    stage, steps = run.stage("policy"), int(STEPS * share)
    stage.enter("running")
    when = BEGIN.isoformat(timespec="milliseconds")
    run.events.append({"time": when, "kind": "stage_started", "stage": "policy", "from_step": 0})
    for number in range(1, 101):
        step = number * steps // 100
        event = {"time": when, "kind": "checkpoint_saved", "stage": "policy", "step": step, "uri": f"step-{step}"}
        run.events.append(event)
    metrics(stage, steps)
    losses(stage, int(LOSSES * share), steps)
    rollouts(stage, int(ROLLOUTS * share), steps)
    readings(stage, steps)
    return run


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--share", type=float, default=1.0)
    chosen = parser.parse_args()
    begun = time.perf_counter()
    print(f"{make(chosen.folder, chosen.share).uri}, {time.perf_counter() - begun:.1f} s")
