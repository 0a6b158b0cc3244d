"""Worker groups under Ray against the same ranks under torchrun: the time of a step, of a call, and to the first step.

    python benchmarks/groups.py [--quick]

A Qwen3 of 4 layers and hidden 256, vocabulary 8,192, fp32, steps of about a second; groups of one rank of two threads
and of two ranks of one. Both sides run the same stage of the same manifest, in turn; a step's time is the median of
those after the first few, and a side's that of its rounds. A call is the controller's look at every rank. The first
step is that of ``examples/demo.yaml``, from the start of ``postlude run``.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from sides import WARM_UP, Words

STEPS, ROUNDS, CALLS = 24, 5, 300
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
ENVIRONMENT = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
DEMO = Path(__file__).resolve().parents[1] / "examples" / "demo.yaml"


def manifest_of(folder: Path, name: str, ranks: int) -> dict[str, Any]:
    stage = {
        "recipe": "sft",
        "model": {"new": {"architecture": "qwen3", "config": SHAPE}},
        "tokenizer": {"path": str(folder / "tokenizer")},
        "data": {"texts": 1.0},
        "steps": STEPS,
        "batch": {"tokens": 4096, "block": 1024},
        "threads": 2 // ranks,
        "precision": "fp32",
        "checkpoint": {"every": 10**6},
    }
    return {
        "name": name,
        "run_dir": str(folder / name),
        "data": {"texts": {"source": {"path": str(folder / "texts.jsonl")}, "format": "text"}},
        "compute": {"pools": {"train": {"workers": ranks}}},
        "stages": {"sft": stage},
    }


def under_ray(folder: Path, name: str, ranks: int) -> float:
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(manifest_of(folder, name, ranks)))
    _run([sys.executable, "-m", "postlude", "run", str(path)])
    return _seconds(folder / name / name)


def under_torchrun(folder: Path, name: str, ranks: int) -> float:
    from postlude.manifest.load import load
    from postlude.stages.task import StageTask

    run = folder / name / name
    tree = load(json.dumps(manifest_of(folder, name, ranks)), f"{name}.yaml").tree
    task = folder / f"{name}.pickle"
    task.write_bytes(pickle.dumps(StageTask(tree, "sft", str(run), 2 // ranks)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    _run([*torchrun, __file__, "--rank", str(task)], OMP_NUM_THREADS=str(2 // ranks))
    return _seconds(run)


def as_rank(task: Path) -> None:
    """What each process does that torchrun starts."""
    from postlude.stages.stage import run_stage_here

    run_stage_here(pickle.loads(task.read_bytes()))


def milliseconds_of_a_call(ranks: int) -> float:
    import ray

    from postlude.cluster import placement
    from postlude.cluster.group import WorkerGroup
    from postlude.cluster.placement import Demand
    from postlude.cluster.providers.base import open_cluster
    from postlude.cluster.worker import WorkerSetup
    from postlude.manifest.compute import Compute, Pool

    compute = Compute(pools={"train": Pool(workers=ranks)})
    demand = Demand.of(compute, compute.pools["train"])
    with open_cluster(compute) as cluster:
        held = placement.place(demand, ranks, 60.0, lambda: False)
        with WorkerGroup("idle", demand, held, ranks, WorkerSetup("idle", 1, {}), cluster.interface) as group:
            spent = []
            for _ in range(CALLS):
                begin = time.perf_counter()
                ray.get([worker.look.remote() for worker in group.workers])
                spent.append(time.perf_counter() - begin)
    return 1000 * statistics.median(spent)


def seconds_to_the_first_step(folder: Path, *more: str) -> float:
    journal = folder / "demo" / "stages" / "sft" / "metrics.jsonl"
    begin = time.perf_counter()
    command = [sys.executable, "-m", "postlude", "run", str(DEMO), f"run_dir={folder}", *more]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    while not (journal.exists() and journal.stat().st_size):
        if process.poll() is not None:
            raise SystemExit("the demo ended before its first step")
        time.sleep(0.02)
    seconds = time.perf_counter() - begin
    process.terminate()
    process.wait()
    return seconds


def _run(command: list[str], **environment: str) -> None:
    done = subprocess.run(command, env={**ENVIRONMENT, **environment}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)


def _seconds(run: Path) -> float:
    lines = [json.loads(line) for line in (run / "stages/sft/metrics.jsonl").open()]
    return statistics.median(line["seconds"] for line in lines[WARM_UP:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.rank:
        as_rank(asked.rank)
        return
    table = Table(title="A step on a worker group under Ray, against the same ranks under torchrun")
    for column in ("ranks", "torchrun s/step", "Ray s/step", "speed", "a call on all ranks"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        words = Words(random.Random(0))
        words.save_tokenizer(folder / "tokenizer")
        (folder / "texts.jsonl").write_text(
            "".join(json.dumps({"text": words.said(300)}) + "\n" for _ in range(400)), encoding="utf-8"
        )
        for ranks in (1, 2):
            ray, torchrun = [], []
            for number in range(1 if asked.quick else ROUNDS):
                torchrun.append(under_torchrun(folder, f"torchrun-{ranks}-{number}", ranks))
                ray.append(under_ray(folder, f"ray-{ranks}-{number}", ranks))
                print(f"{ranks} ranks: torchrun {torchrun[-1]:.3f}, Ray {ray[-1]:.3f} s a step", file=sys.stderr)
            ours, theirs = statistics.median(ray), statistics.median(torchrun)
            call = f"{milliseconds_of_a_call(ranks):.2f} ms"
            table.add_row(str(ranks), f"{theirs:.3f}", f"{ours:.3f}", f"{theirs / ours:.3f} times", call)
        first = seconds_to_the_first_step(folder / "with")
        inline = seconds_to_the_first_step(folder / "without", "--inline")
    Console(width=110).print(table)
    print(f"from `postlude run` to the first step of the demo: {first:.1f} s, and {inline:.1f} s with --inline")


if __name__ == "__main__":
    main()
