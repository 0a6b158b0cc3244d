"""Direct preference optimisation against TRL's DPOTrainer at its best settings, same pairs, same new model.

    python benchmarks/dpo.py [--quick]

Qwen3 of 2 layers and hidden 256, vocabulary 151,936, fp32, AdamW; a step is 8 pairs of about 250 tokens a side, 150 of
them trained, against a frozen reference that runs beside the policy. TRL takes one pair a micro-batch, the fastest and
smallest of what it offers here, and accumulates. Speed is pairs a second, by the median of the steps after the first
few; memory is the growth of the peak resident set from after the imports to the end of training.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from sides import THREADS, Case, Growth, Words, clock, main, our_run

PAIRS, BLOCK = 8, 544
PROMPT_WORDS, ANSWER_WORDS = 32, 52
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "tie_word_embeddings": True,
}


def postlude_side(folder: Path, steps: int, vocabulary: int) -> dict[str, float]:
    dpo = {
        "recipe": "dpo",
        "model": {"path": str(folder / f"model-{vocabulary}")},
        "data": {"pairs": 1.0},
        "steps": steps,
        # A block holds one pair.
        "batch": {"tokens": PAIRS * BLOCK, "block": BLOCK, "window": PAIRS},
        "optimizer": {"name": "adamw", "lr": 1e-6},
        "threads": THREADS,
        "precision": "fp32",
        "checkpoint": {"every": 10**6},
    }
    pairs = {"source": {"path": str(folder / "pairs.jsonl")}, "format": "preference"}
    measured = our_run(folder, {"dpo": dpo}, {"pairs": pairs}, "dpo")
    return {**measured, "rate": PAIRS / measured["seconds"]}


def trl_side(folder: Path, steps: int, vocabulary: int) -> dict[str, float]:
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    torch.set_num_threads(THREADS)
    growth, watch = Growth(), clock()
    place = folder / f"model-{vocabulary}"
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32),
        AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32),
        args=DPOConfig(
            output_dir=str(folder / "trl"),
            max_steps=steps,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=PAIRS,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            optim="adamw_torch_fused",
            learning_rate=1e-6,
            logging_steps=10**6,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=load_dataset("json", data_files=str(folder / "pairs.jsonl"), split="train"),
        processing_class=AutoTokenizer.from_pretrained(place),
        callbacks=[watch],
    )
    trainer.train()
    return {"rate": PAIRS / watch.seconds(), "seconds": watch.seconds(), "growth": growth.bytes()}


def prepare(folder: Path) -> None:
    """A tokenizer, pairs of conversations, and the model that both sides start from."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    words = Words(random.Random(0))
    with (folder / "pairs.jsonl").open("w") as file:
        for _ in range(400):
            record = {"prompt": [{"role": "user", "content": words.said(PROMPT_WORDS)}]}
            for side in ("chosen", "rejected"):
                record[side] = [{"role": "assistant", "content": words.said(ANSWER_WORDS)}]
            file.write(json.dumps(record) + "\n")
    words.save_tokenizer(folder / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    for case in CASES:
        place = folder / f"model-{case.vocabulary}"
        torch.manual_seed(0)
        config = AutoConfig.for_model("qwen3", **SHAPE, vocab_size=case.vocabulary)
        AutoModelForCausalLM.from_config(config).save_pretrained(place)
        tokenizer.save_pretrained(place)


CASES = (Case(151936, steps=5, rounds=1),)

if __name__ == "__main__":
    main(
        __file__,
        f"Preference optimisation against TRL, {PAIRS} pairs a step, fp32, 2 threads: medians",
        "TRL",
        {"trl": trl_side, "postlude": postlude_side},
        prepare,
        *CASES,
    )
