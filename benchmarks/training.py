"""Supervised training against TRL's SFTTrainer at its best settings, same machine, same data, same new model.

    python benchmarks/training.py [--quick] [--vocabulary N]

Qwen3 of 4 layers and hidden 256, conversations of which half the tokens are trained, AdamW, fp32, 4,096 tokens a
step; vocabulary 8,192, then 151,936. TRL packs with best fit, one sequence a micro-batch, accumulates, no
recomputation, fused AdamW. Speed is tokens a second, by the median of the steps after the first few; memory is the
growth of the peak resident set from after the imports to the end of training.
"""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path

from sides import THREADS, Case, Growth, Words, clock, main, our_run

TOKENS, BLOCK = 4096, 1024
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "tie_word_embeddings": True,
}


def postlude_side(folder: Path, steps: int, vocabulary: int) -> dict[str, float]:
    sft = {
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
    chats = {"source": {"path": str(folder / "chats.jsonl")}, "format": "messages"}
    return our_run(folder, {"sft": sft}, {"chats": chats}, "sft")


def trl_side(folder: Path, steps: int, vocabulary: int) -> dict[str, float]:
    import torch
    from datasets import load_dataset
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(THREADS)
    growth, watch = Growth(), clock()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **SHAPE, vocab_size=vocabulary))
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
        callbacks=[watch],
    )
    tokens = statistics.mean(len(row["input_ids"]) for row in trainer.train_dataset) * (TOKENS // BLOCK)
    trainer.train()
    return {"rate": tokens / watch.seconds(), "seconds": watch.seconds(), "growth": growth.bytes()}


def prepare(folder: Path) -> None:
    """A tokenizer of 8,192 entries with generation marks, and conversations whose two sides are of a length."""
    rng = random.Random(0)
    words = Words(rng)
    with (folder / "chats.jsonl").open("w") as file:
        for _ in range(4000):
            length = max(8, int(rng.lognormvariate(4.2, 0.8)))
            messages = [{"role": role, "content": words.said(length)} for role in ("user", "assistant")]
            file.write(json.dumps({"messages": messages}) + "\n")
    words.save_tokenizer(folder / "tokenizer")


if __name__ == "__main__":
    main(
        __file__,
        "Supervised training against TRL, fp32, 2 threads: medians",
        "TRL",
        {"trl": trl_side, "postlude": postlude_side},
        prepare,
        Case(8192, steps=12, rounds=3),
        Case(151936, steps=6, rounds=1),  # a step of TRL's takes the better part of a minute there
    )
