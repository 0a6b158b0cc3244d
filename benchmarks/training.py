"""Supervised training against TRL's SFTTrainer at its best settings, same machine, same data, same new model.

    python benchmarks/training.py [--quick]

Qwen3 of 4 layers and hidden 256, conversations of which half the tokens are trained, AdamW, fp32, 4,096 tokens a
step; vocabulary 8,192, then 151,936. TRL packs with best fit, one sequence a micro-batch, accumulates, no
recomputation, fused AdamW. Runs take turns, each in a process of its own. Speed is the median of the steps after
the first few; memory is the growth of the peak resident set from after the imports to the end of training.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

TOKENS, BLOCK, THREADS = 4096, 1024, 2
WARM_UP = 3
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "tie_word_embeddings": True,
}


# --- the two sides, each in a process of its own ------------------------------------------------------------


def postlude_side(folder: Path, steps: int, vocabulary: int) -> dict[str, float]:
    import torch  # noqa: F401
    import transformers  # noqa: F401

    from postlude.telemetry.hardware import peak_resident_bytes, reset_peak, resident_bytes
    from postlude.workflow.run import run

    manifest = {
        "name": "benchmark",
        "run_dir": str(folder / "runs"),
        "data": {"chats": {"source": {"path": str(folder / "chats.jsonl")}, "format": "messages"}},
        "stages": {
            "sft": {
                "recipe": "sft",
                "model": {"new": {"architecture": "qwen3", "config": {**SHAPE, "vocab_size": vocabulary}}},
                "tokenizer": {"path": str(folder / "tokenizer")},
                "data": {"chats": 1.0},
                "steps": steps,
                "batch": {"tokens": TOKENS, "block": BLOCK},
                "optimizer": {"name": "adamw", "lr": 1e-4},
                "threads": THREADS,
                "precision": "fp32",
                "checkpoint": {"every": 10**6},
            }
        },
    }
    path = folder / "benchmark.yaml"
    path.write_text(json.dumps(manifest))
    base = resident_bytes()
    reset_peak()
    if run(str(path), [], inline=True) != 0:
        raise SystemExit("the run failed")
    lines = [json.loads(line) for line in (folder / "runs/benchmark/stages/sft/metrics.jsonl").open()]
    rates = [line["tokens"] / line["seconds"] for line in lines[WARM_UP:]]
    return {"rate": statistics.median(rates), "growth": peak_resident_bytes() - base}


def trl_side(folder: Path, steps: int, vocabulary: int) -> dict[str, float]:
    import time

    import torch
    from datasets import load_dataset
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from postlude.telemetry.hardware import peak_resident_bytes, reset_peak, resident_bytes

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *args, **keywords) -> None:
            self.ends.append(time.perf_counter())

    torch.set_num_threads(THREADS)
    base = resident_bytes()
    reset_peak()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **SHAPE, vocab_size=vocabulary))
    clock = Clock()
    trainer = SFTTrainer(
        model,
        SFTConfig(
            output_dir=str(folder / "trl"),
            max_steps=steps,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=TOKENS // BLOCK,
            max_length=BLOCK,
            packing=True,
            assistant_only_loss=True,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            optim="adamw_torch_fused",
            learning_rate=1e-4,
            logging_steps=10**6,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=load_dataset("json", data_files=str(folder / "chats.jsonl"), split="train"),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    tokens = statistics.mean(len(row["input_ids"]) for row in trainer.train_dataset) * (TOKENS // BLOCK)
    trainer.train()
    seconds = [after - before for before, after in zip(clock.ends[WARM_UP:], clock.ends[WARM_UP + 1 :])]
    return {"rate": tokens / statistics.median(seconds), "growth": peak_resident_bytes() - base}


# --- what they are given ------------------------------------------------------------------------------------


def prepare(folder: Path) -> None:
    """A tokenizer of 8,192 entries with generation marks, and conversations whose two sides are of a length."""
    from postlude.data.tokenizer import train_tokenizer
    from postlude.manifest.schema import TrainTokenizer

    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(6000)]

    def said(n: int) -> str:
        return " ".join(rng.choices(words, k=n))

    with (folder / "chats.jsonl").open("w") as file:
        for _ in range(4000):
            length = max(8, int(rng.lognormvariate(4.2, 0.8)))
            roles = ("user", "assistant")
            json.dump({"messages": [{"role": role, "content": said(length)} for role in roles]}, file)
            file.write("\n")
    texts = (said(100) for _ in range(2000))
    train_tokenizer(TrainTokenizer(kind="bpe", vocabulary=8192), texts).save_pretrained(folder / "tokenizer")


def measure(side: str, folder: Path, steps: int, vocabulary: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as out:
        for item in ("chats.jsonl", "tokenizer"):
            os.symlink(folder / item, Path(out) / item)
        command = [sys.executable, __file__, "--side", side, "--folder", out]
        command += ["--steps", str(steps), "--vocabulary", str(vocabulary)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--side", choices=["postlude", "trl"])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--vocabulary", type=int)
    arguments = parser.parse_args()
    if arguments.side:
        side = {"postlude": postlude_side, "trl": trl_side}[arguments.side]
        print(json.dumps(side(arguments.folder, arguments.steps, arguments.vocabulary)))
        return
    table = Table(title="Training, fp32, 2 threads: medians")
    for column in (
        "vocabulary",
        "TRL tok/s",
        "Postlude tok/s",
        "speed ratio",
        "TRL MiB",
        "Postlude MiB",
        "memory ratio",
    ):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as place:
        prepare(Path(place))
        # A step of TRL's at the large vocabulary takes the better part of a minute.
        for vocabulary, steps, rounds in ((8192, 12, 3), (151936, 6, 1)):
            if arguments.vocabulary not in (None, vocabulary):
                continue
            found: dict[str, list[dict[str, float]]] = {"trl": [], "postlude": []}
            for _ in range(1 if arguments.quick else rounds):
                for side in found:
                    found[side].append(measure(side, Path(place), steps, vocabulary))
                    print(f"{vocabulary:,} {side}: {found[side][-1]}", file=sys.stderr)
            rate = {side: statistics.median(run["rate"] for run in runs) for side, runs in found.items()}
            growth = {side: statistics.median(run["growth"] for run in runs) / 2**20 for side, runs in found.items()}
            table.add_row(
                f"{vocabulary:,}",
                f"{rate['trl']:,.0f}",
                f"{rate['postlude']:,.0f}",
                f"{rate['postlude'] / rate['trl']:.2f}",
                f"{growth['trl']:,.0f}",
                f"{growth['postlude']:,.0f}",
                f"{growth['postlude'] / growth['trl']:.2f}",
            )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
