"""The modes of online reinforcement learning against each other: answers whose lengths have a long tail.

    python benchmarks/modes.py [--rounds N]

The model, the prompts and the lengths are those of grpo.py: most answers are short and some are as long as may be. A
round is 16 prompts with 4 samples each, and the reward is for a first letter of the first half of the alphabet. All
modes have two cores: colocated as two threads, apart as one thread for the engine and one for the trainer. Told are
seconds for 16 prompts that are trained (over all rounds but the first, by the clock: over-sampled rounds may have
more), the shares of the time in which trainer and engine were at work, the oldest token in rounds, and the mean reward
of the last five rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from grpo import prepare
from rich.console import Console
from rich.table import Table

VOCABULARY = 8192
PROMPTS = 16
"""Of a round."""
APART = {"name": "native", "apart": True}
MODES: dict[str, dict[str, Any]] = {
    "colocated": {},
    "colocated, over-sampled": {"oversample": 2.0},
    "separate": {"engine": APART},
    "asynchronous": {"engine": APART, "ahead": 1},
    "asynchronous, over-sampled": {"engine": APART, "ahead": 1, "oversample": 2.0},
}


def measure(mode: str, folder: Path, rounds: int) -> dict[str, float]:
    """Run a stage in one mode, in this process."""
    from postlude.workflow.run import run

    keys = MODES[mode]
    stage = {
        "recipe": "grpo",
        "model": {"path": str(folder / f"model-{VOCABULARY}")},
        "data": {"prompts": 1.0},
        "steps": rounds,
        "rollout": {"prompts": PROMPTS, "max_tokens": 192, "concurrency": 128, **keys},
        "group": 4,
        "reward": [{"function": {"name": "regex", "pattern": r"^\s*[a-m]"}}],
        "batch": {"tokens": 32768, "block": 2048},
        "optimizer": {"name": "adamw", "lr": 3e-5},
        "schedule": "constant",
        "threads": 1 if "engine" in keys else 2,
        "precision": "fp32",
        "checkpoint": {"every": 10**6},
    }
    prompts = {"source": {"path": str(folder / "prompts.jsonl")}, "format": "prompt_completion"}
    with tempfile.TemporaryDirectory() as out:
        manifest = {"name": "modes", "run_dir": out, "data": {"prompts": prompts}, "stages": {"rl": stage}}
        path = Path(out) / "modes.yaml"
        path.write_text(json.dumps(manifest))
        if run(str(path), [], inline=True) != 0:
            raise SystemExit("the run failed")
        told = Path(out) / "modes/stages/rl"
        lines = [json.loads(line) for line in (told / "metrics.jsonl").open()]
        samples = [json.loads(line) for part in sorted((told / "rollouts").iterdir()) for line in part.open()]
    counted = lines[1:]
    trained = [one for one in samples if one.get("outcome") == "trained"]
    return {
        "seconds": PROMPTS * sum(line["seconds"] for line in counted) / prompts_of(lines),
        "trainer": statistics.mean(line["busy_trainer"] for line in counted),
        "engine": statistics.mean(line["busy_engine"] for line in counted),
        "oldest": max(one["step"] - 1 - one["versions"][0] for one in trained),
        "reward": statistics.mean(line["reward"] for line in lines[-5:]),
    }


def prompts_of(lines: list[dict[str, Any]]) -> float:
    """How many were trained in all rounds but the first."""
    return lines[-1]["prompts_trained"] - lines[0]["prompts_trained"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    for hidden in ("--mode", "--folder"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.mode:
        print(json.dumps(measure(asked.mode, Path(asked.folder), asked.rounds)))
        return
    table = Table(title="Modes of GRPO on answers of very different lengths, two cores")
    for column in ("mode", "s/16 prompts", "speed", "trainer busy", "engine busy", "oldest token", "reward"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        first = None
        for mode in MODES:
            command = [sys.executable, __file__, "--mode", mode, "--folder", folder, "--rounds", str(asked.rounds)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            print(f"{mode}: {found}", file=sys.stderr)
            first = first or found["seconds"]
            table.add_row(
                mode,
                f"{found['seconds']:.2f}",
                f"{first / found['seconds']:.2f} times",
                f"{found['trainer']:.0%}",
                f"{found['engine']:.0%}",
                f"{found['oldest']:.0f} rounds",
                f"{found['reward']:.2f}",
            )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
