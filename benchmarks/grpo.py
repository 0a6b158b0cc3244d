"""A step of GRPO against TRL's GRPOTrainer: same model, same prompts, same settings, answers of very different lengths.

    python benchmarks/grpo.py [--quick]

A Llama of 4 layers and hidden 256, vocabulary 8,192, fp32, AdamW; a step is 8 prompts with 8 samples each, of at most
128 tokens. The weights are random, with a row of the end-of-sequence token that makes it likely at many places: most
answers are short and one in ten is as long as may be. Speed is steps a second, by the median of the steps after the
first few; memory is the growth of the peak resident set from after the imports to the end of training.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from sides import THREADS, Case, Growth, Words, clock, main, our_run

PROMPTS, GROUP, LONGEST = 8, 8, 128
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
}
END_ROW = 12.0
"""How many times as long as the others the row of the token that ends an answer is."""


def postlude_side(folder: Path, steps: int, vocabulary: int) -> dict[str, float]:
    stage = {
        "recipe": "grpo",
        "model": {"path": str(folder / f"model-{vocabulary}")},
        "data": {"prompts": 1.0},
        "steps": steps,
        "rollout": {"prompts": PROMPTS, "max_tokens": LONGEST},
        "group": GROUP,
        "reward": [{"function": {"name": "regex", "pattern": "a"}}],
        "batch": {"tokens": 32768, "block": 2048},
        "optimizer": {"name": "adamw", "lr": 1e-6},
        "threads": THREADS,
        "precision": "fp32",
        "checkpoint": {"every": 10**6},
    }
    prompts = {"source": {"path": str(folder / "prompts.jsonl")}, "format": "prompt_completion"}
    measured = our_run(folder, {"grpo": stage}, {"prompts": prompts}, "grpo")
    return {**measured, "rate": 1 / measured["seconds"]}


def trl_side(folder: Path, steps: int, vocabulary: int) -> dict[str, float]:
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(THREADS)
    growth, watch = Growth(), clock()
    place = folder / f"model-{vocabulary}"
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32),
        reward_funcs=lambda completions, **_: [float("a" in text) for text in completions],
        args=GRPOConfig(
            output_dir=str(folder / "trl"),
            max_steps=steps,
            per_device_train_batch_size=PROMPTS * GROUP,
            num_generations=GROUP,
            max_completion_length=LONGEST,
            loss_type="grpo",
            temperature=1.0,
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
        train_dataset=load_dataset("json", data_files=str(folder / "prompts.jsonl"), split="train"),
        processing_class=AutoTokenizer.from_pretrained(place),
        callbacks=[watch],
    )
    trainer.train()
    return {"rate": 1 / watch.seconds(), "seconds": watch.seconds(), "growth": growth.bytes()}


def prepare(folder: Path) -> None:
    """A tokenizer, prompts, and the model that both sides start from."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    words = Words(random.Random(0))
    with (folder / "prompts.jsonl").open("w") as file:
        for number in range(400):
            file.write(json.dumps({"prompt": words.said(8 + number % 24), "completion": "a"}) + "\n")
    words.save_tokenizer(folder / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    for case in CASES:
        place = folder / f"model-{case.vocabulary}"
        torch.manual_seed(0)
        end = tokenizer.eos_token_id
        config = AutoConfig.for_model("llama", **SHAPE, vocab_size=case.vocabulary, eos_token_id=end)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(4.0)[end].mul_(END_ROW)
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)


CASES = (Case(8192, steps=8, rounds=1),)

if __name__ == "__main__":
    main(
        __file__,
        f"GRPO against TRL, {PROMPTS} prompts by {GROUP} samples a step, fp32, 2 threads: medians",
        "TRL",
        {"trl": trl_side, "postlude": postlude_side},
        prepare,
        *CASES,
    )
