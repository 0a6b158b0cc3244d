"""Distillation against TRL's GKDTrainer at its best settings, same conversations, same student and teacher.

    python benchmarks/distillation.py [--quick]

Student and teacher are Qwen3 of 2 layers and hidden 256, vocabulary 151,936, fp32; AdamW; a step is 16 conversations of
about 250 tokens, 150 of them trained, forward KL to the live teacher on the data's own answers (TRL's ``lmbda=0``). TRL
takes one conversation a micro-batch and accumulates. Speed is conversations a second, by the median of the steps after
the first few; memory is the growth of the peak resident set from after the imports to the end of training.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from sides import THREADS, Case, Growth, Words, clock, main, our_run

CONVERSATIONS, BLOCK = 16, 1088
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
    distill = {
        "recipe": "distill",
        "model": {"path": str(folder / f"student-{vocabulary}")},
        "teacher": {"path": str(folder / f"teacher-{vocabulary}")},
        "divergence": "forward_kl",
        "data": {"chats": 1.0},
        "steps": steps,
        # A block holds four conversations.
        "batch": {"tokens": CONVERSATIONS // 4 * BLOCK, "block": BLOCK, "window": CONVERSATIONS // 4},
        "optimizer": {"name": "adamw", "lr": 1e-6},
        "threads": THREADS,
        "precision": "fp32",
        "checkpoint": {"every": 10**6},
    }
    chats = {"source": {"path": str(folder / "chats.jsonl")}, "format": "messages"}
    measured = our_run(folder, {"distill": distill}, {"chats": chats}, "distill")
    return {**measured, "rate": CONVERSATIONS / measured["seconds"]}


def trl_side(folder: Path, steps: int, vocabulary: int) -> dict[str, float]:
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    torch.set_num_threads(THREADS)
    growth, watch = Growth(), clock()
    student, teacher = (folder / f"{role}-{vocabulary}" for role in ("student", "teacher"))
    trainer = GKDTrainer(
        AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32),
        AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32),
        args=GKDConfig(
            output_dir=str(folder / "trl"),
            max_steps=steps,
            lmbda=0.0,
            beta=0.0,
            temperature=1.0,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=CONVERSATIONS,
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
        train_dataset=load_dataset("json", data_files=str(folder / "chats.jsonl"), split="train"),
        processing_class=AutoTokenizer.from_pretrained(student),
        callbacks=[watch],
    )
    trainer.train()
    return {"rate": CONVERSATIONS / watch.seconds(), "seconds": watch.seconds(), "growth": growth.bytes()}


def prepare(folder: Path) -> None:
    """A tokenizer, conversations, and the models that both sides start from."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    words = Words(random.Random(0))
    with (folder / "chats.jsonl").open("w") as file:
        for _ in range(600):
            messages = [
                {"role": "user", "content": words.said(PROMPT_WORDS)},
                {"role": "assistant", "content": words.said(ANSWER_WORDS)},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    words.save_tokenizer(folder / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    for case in CASES:
        for seed, role in enumerate(("student", "teacher")):
            torch.manual_seed(seed)
            config = AutoConfig.for_model("qwen3", **SHAPE, vocab_size=case.vocabulary)
            AutoModelForCausalLM.from_config(config).save_pretrained(folder / f"{role}-{case.vocabulary}")
            tokenizer.save_pretrained(folder / f"{role}-{case.vocabulary}")


CASES = (Case(151936, steps=5, rounds=1),)

if __name__ == "__main__":
    main(
        __file__,
        f"Distillation against TRL, {CONVERSATIONS} conversations a step, fp32, 2 threads: medians",
        "TRL",
        {"trl": trl_side, "postlude": postlude_side},
        prepare,
        *CASES,
    )
