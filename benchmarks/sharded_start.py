"""Start-up of a sharded model: the most memory that each of two processes has, against ``from_pretrained`` in each.

    python benchmarks/sharded_start.py [--quick]

A Llama of 2.2 GB in bf16 (``--quick``: 0.3 GB), made at random. Ours: two ranks, FSDP, each reading the slices that are
its own into fp32, with the rest of what makes a model ready for training. Theirs: ``AutoModelForCausalLM`` in fp32 in
each process. The interpreter with its imports is measured, too, and taken off for the comparison with the shard.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

GB = 1e9
SHAPES = {
    "full": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "vocab_size": 32000},
    "quick": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "vocab_size": 32000},
}


def write_checkpoint(folder: Path, shape: str) -> float:
    """A checkpoint of random bf16 weights, written shard by shard; its bytes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("llama", **SHAPES[shape], num_attention_heads=16, num_key_value_heads=8)
    torch.set_default_dtype(torch.bfloat16)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="500MB")
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def as_rank(what: str, place: str) -> None:
    """Load as one of two ranks, and print the peak and the seconds."""
    import torch
    import torch.distributed  # both sides have it
    from transformers import AutoModelForCausalLM

    from postlude.manifest.compute import Shape
    from postlude.manifest.schema import ModelFrom
    from postlude.model.load import load_divided
    from postlude.training.workers import Workers

    workers = Workers.join(shape=lambda world: Shape.of(world, 1, 1))
    workers.barrier()
    base, begin = peak_bytes(), time.perf_counter()
    if what == "ours":
        model = load_divided(
            ModelFrom(path=place),
            place,
            None,
            seed=0,
            mesh=workers.mesh,
            device=torch.device("cpu"),  # type: ignore
        )
        own = sum(p.to_local().nbytes for p in model.parameters())
    elif what == "theirs":
        theirs = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
        own = sum(p.nbytes for p in theirs.parameters())
    seconds = time.perf_counter() - begin
    workers.barrier()
    print(json.dumps({"base": base, "peak": peak_bytes(), "own": own, "seconds": seconds}))
    workers.leave()


def peak_bytes() -> int:
    """The most memory that this process has had; ``getrusage`` would include the process that it was made from."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def both_ranks(what: str, place: str, meeting: str) -> list[dict[str, float]]:
    processes = []
    for rank in range(2):
        told = {
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "POSTLUDE_RENDEZVOUS": f"file://{meeting}",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, __file__, "--rank", what, "--place", place]
        environment = {**os.environ, **told, "GLOO_SOCKET_IFNAME": "lo"}
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True))
    printed = [process.communicate()[0] for process in processes]
    return [json.loads(text.strip().splitlines()[-1]) for text in printed]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small checkpoint")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    parser.add_argument("--place", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.rank:
        as_rank(asked.rank, asked.place)
        return
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "checkpoint")
        size = write_checkpoint(place, "quick" if asked.quick else "full")
        measured = {what: both_ranks(what, str(place), f"{folder}/{what}") for what in ("theirs", "ours")}
    table = Table(title=f"Two processes load a checkpoint of {size / GB:.2f} GB into fp32")
    for column in ("", "peak of a process", "of that, weights", "above the interpreter", "over its weights", "seconds"):
        table.add_column(column, justify="right")
    worst = {what: max(ranks, key=lambda rank: rank["peak"]) for what, ranks in measured.items()}
    for what, rank in worst.items():
        above = rank["peak"] - rank["base"]
        table.add_row(
            what,
            f"{rank['peak'] / GB:.2f} GB",
            f"{rank['own'] / GB:.2f} GB",
            f"{above / GB:.2f} GB",
            f"{above / rank['own']:.2f} times",
            f"{rank['seconds']:.1f}",
        )
    Console(width=110).print(table)
    print(f"peak resident memory, ours over theirs: {worst['ours']['peak'] / worst['theirs']['peak']:.2f} times")


if __name__ == "__main__":
    main()
