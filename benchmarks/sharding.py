"""A step's time and a worker's memory: in full, with an adapter, recomputed, sharded, and with layers divided.

    python benchmarks/sharding.py [--quick]

A Qwen3 of 8 layers and hidden 512, vocabulary 32,768, fp32, steps of 4,096 tokens in blocks of 1,024. Every row is the
same stage with other keys, run under torchrun; a step's time is the median of those after the first few, and ratios are
against the same number of ranks that hold everything. Ranks have one thread each.
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

MIB = 2**20
STEPS, QUICK_STEPS = 10, 5
SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 32768,
    "tie_word_embeddings": True,
}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "whole": (1, {}),
    "recompute: selective": (1, {"recompute": "selective"}),
    "recompute: layer": (1, {"recompute": "layer"}),
    "LoRA, rank 16": (1, {"adapter": {"rank": 16}}),
    "whole, two ranks": (2, {}),
    "shard, two ranks": (2, {"parallel": {"shard": True}}),
    "tensor: 2": (2, {"parallel": {"tensor": 2}}),
    "LoRA, shard, two ranks": (2, {"adapter": {"rank": 16}, "parallel": {"shard": True}}),
}
BASELINES = {1: "whole", 2: "whole, two ranks"}


def manifest_of(folder: Path, name: str, ranks: int, keys: dict[str, Any], steps: int) -> dict[str, Any]:
    stage = {
        "recipe": "sft",
        "model": {"path": str(folder / "model")},
        "data": {"texts": 1.0},
        "steps": steps,
        "batch": {"tokens": 4096, "block": 1024},
        "threads": 1,
        "checkpoint": {"every": 10**6},
        **keys,
    }
    return {
        "name": name,
        "run_dir": str(folder / "runs"),
        "data": {"texts": {"source": {"path": str(folder / "texts.jsonl")}, "format": "text"}},
        "compute": {"pools": {"train": {"workers": ranks}}},
        "stages": {"sft": stage},
    }


def as_rank(task: Path) -> None:
    """What each process does that torchrun starts."""
    from postlude.stages.stage import run_stage_here

    told = pickle.loads(task.read_bytes())
    run_stage_here(told)
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    Path(f"{task}.{os.environ.get('RANK', '0')}").write_text(str(peak))


def measured(folder: Path, name: str, ranks: int, keys: dict[str, Any], steps: int) -> dict[str, float]:
    from postlude.manifest.load import load
    from postlude.stages.task import StageTask

    label = "".join(letter if letter.isalnum() else "-" for letter in name)
    run = folder / "runs" / label
    tree = load(json.dumps(manifest_of(folder, label, ranks, keys, steps)), "sharding.yaml").tree
    task = folder / f"{label}.pickle"
    task.write_bytes(pickle.dumps(StageTask(tree, "sft", str(run), 1)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [*torchrun, __file__, "--rank", str(task)], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    lines = [json.loads(line) for line in (run / "stages/sft/metrics.jsonl").open()]
    saved = [path for path in (run / "stages/sft/checkpoints").rglob("*") if path.is_file()]
    return {
        "seconds": statistics.median(line["seconds"] for line in lines[WARM_UP:]),
        "peak": max(float(Path(f"{task}.{rank}").read_text()) for rank in range(ranks)),
        "checkpoint": float(sum(path.stat().st_size for path in saved)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.rank:
        as_rank(asked.rank)
        return
    table = Table(title="The same stage with other keys")
    for column in ("", "seconds a step", "times", "peak of a worker", "times", "checkpoint"):
        table.add_column(column, justify="right" if column else "left")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        _prepare(folder)
        found: dict[str, dict[str, float]] = {}
        for name, (ranks, keys) in CASES.items():
            begin = time.perf_counter()
            found[name] = measured(folder, name, ranks, keys, QUICK_STEPS if asked.quick else STEPS)
            print(f"{name}: {time.perf_counter() - begin:.0f} s", file=sys.stderr)
            base = found[BASELINES[ranks]]
            table.add_row(
                name,
                f"{found[name]['seconds']:.2f}",
                f"{found[name]['seconds'] / base['seconds']:.2f}",
                f"{found[name]['peak'] / MIB:,.0f} MiB",
                f"{found[name]['peak'] / base['peak']:.2f}",
                f"{found[name]['checkpoint'] / MIB:,.1f} MiB",
            )
    Console(width=110).print(table)


def _prepare(folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    words = Words(random.Random(0))
    words.save_tokenizer(folder / "model")
    (folder / "texts.jsonl").write_text(
        "".join(json.dumps({"text": words.said(300)}) + "\n" for _ in range(400)), encoding="utf-8"
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **SHAPE)).save_pretrained(folder / "model")


if __name__ == "__main__":
    main()
