"""Killed at any moment and run again, a run is bitwise the one that was never disturbed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as parquet
import pytest

STEPS = 40

DETERMINISTIC = (
    "step",
    "epoch",
    "progress",
    "loss",
    "lr",
    "grad_norm",
    "tokens",
    "trained_tokens",
    "documents",
    "skipped",
    "eval_held_out_loss",
)


def write_manifest(folder: Path, name: str, workers: int) -> Path:
    data = folder / "chats.jsonl"
    if not data.exists():
        rng = random.Random(0)
        with data.open("w") as file:
            for number in range(700):
                said = " ".join(str(rng.randrange(1000)) for _ in range(rng.randrange(1, 30)))
                messages = [{"role": "user", "content": f"{number}: {said}"}, {"role": "assistant", "content": said}]
                json.dump({"messages": messages}, file)
                file.write("\n")
    config = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    manifest = {
        "name": name,
        "seed": 5,
        "run_dir": str(folder / "runs" / name),  # a folder each: else one run takes over what another made
        "data": {
            "chats": {"source": {"path": str(data)}, "format": "messages"},
            "held_out": {"source": {"path": str(data)}, "format": "messages", "limit": 20},
        },
        "compute": {"pools": {"train": {"workers": workers}}},
        "stages": {
            "sft": {
                "recipe": "sft",
                "model": {"new": {"architecture": "llama", "config": {**config, "attention_dropout": 0.1}}},
                "tokenizer": {"bytes": True},
                "data": {"chats": 1.0},
                "evaluate": {"data": {"held_out": 1.0}, "every": 10},
                "steps": STEPS,
                "batch": {"tokens": 1536, "block": 512, "window": 8},
                "optimizer": {"name": "adamw", "lr": 1e-3},
                "threads": 1,
                "checkpoint": {"every": 3},
            }
        },
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(manifest))
    return path


def start(manifest: Path, inline: bool = False) -> subprocess.Popen:
    command = [sys.executable, "-m", "postlude", "run", str(manifest), *(["--inline"] if inline else [])]
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def metrics(folder: Path, name: str) -> list[dict]:
    lines = (folder / "runs" / name / name / "stages" / "sft" / "metrics.jsonl").read_text().splitlines()
    return [{key: json.loads(line).get(key) for key in DETERMINISTIC} for line in lines]


def examples(folder: Path, name: str) -> Counter:
    parts = sorted((folder / "runs" / name / name / "stages" / "sft" / "examples").glob("part-*.parquet"))
    rows = [row for part in parts for row in parquet.read_table(part).to_pylist()]
    return Counter((row["step"], row["epoch"], row["example_id"], row["loss"], row["tokens"]) for row in rows)


def run_with_kills(manifest: Path, folder: Path, name: str, kills: int, rng: random.Random, inline: bool) -> int:
    """Run until it is done, killing the whole process group ``kills`` times at random moments; how many hit."""
    hits = 0
    journal = folder / "runs" / name / name / "stages" / "sft" / "metrics.jsonl"
    while True:
        process = start(manifest, inline)
        if hits < kills:
            # Wait until this life has made a step, then a random while: it dies anywhere, in a save as well.
            known = journal.read_text().count("\n") if journal.exists() else 0
            aim = known + rng.randrange(1, 8) if hits else rng.randrange(1, 4)
            while process.poll() is None:
                now = journal.read_text().count("\n") if journal.exists() else 0
                if now >= aim or now < known - 6:
                    break
                time.sleep(0.005)
            time.sleep(rng.random() * 0.05)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                hits += 1
        output, _ = process.communicate()
        if process.returncode == 0:
            return hits
        assert process.returncode == -signal.SIGKILL, output.decode()


@pytest.mark.long
@pytest.mark.capability("Exact resume after SIGKILL at any moment")
@pytest.mark.parametrize(("workers", "kills"), [(1, 5), (2, 1)])
def test_a_killed_run_is_bitwise_the_undisturbed_one(tmp_path: Path, workers: int, kills: int) -> None:
    inline = workers == 1  # the process that trains is the one that is killed; the other has a group of workers
    calm = start(write_manifest(tmp_path, "calm", workers), inline)
    output, _ = calm.communicate()
    assert calm.returncode == 0, output.decode()
    hits = run_with_kills(
        write_manifest(tmp_path, "shaken", workers), tmp_path, "shaken", kills, random.Random(workers), inline
    )
    print(f"{hits} kills survived with {workers} worker(s)")
    assert hits >= (kills + 1) // 2
    assert metrics(tmp_path, "shaken") == metrics(tmp_path, "calm")
    assert [line["step"] for line in metrics(tmp_path, "shaken")] == list(range(1, STEPS + 1))
    assert examples(tmp_path, "shaken") == examples(tmp_path, "calm")


@pytest.mark.long
@pytest.mark.capability("SIGTERM checkpoints, exits 130, and the run goes on from there")
def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    calm = start(write_manifest(tmp_path, "calm", 1), inline=True)
    calm.communicate()
    manifest = write_manifest(tmp_path, "stopped", 1)
    journal = tmp_path / "runs" / "stopped" / "stopped" / "stages" / "sft" / "metrics.jsonl"
    process = start(manifest)
    while process.poll() is None and not (journal.exists() and journal.read_text().count("\n") >= 4):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == 130, output.decode()
    last = output.decode().splitlines()[-1]
    assert "holds its checkpoint of step " in last
    assert "Go on with: postlude run " in last
    stopped_at = len(metrics(tmp_path, "stopped"))
    checkpoints = os.listdir(tmp_path / "runs" / "stopped" / "stopped" / "stages" / "sft" / "checkpoints")
    assert f"step-{stopped_at:08d}" in checkpoints
    process = start(manifest)
    output, _ = process.communicate()
    assert process.returncode == 0, output.decode()
    assert metrics(tmp_path, "stopped") == metrics(tmp_path, "calm")
