"""The native engine against transformers' ``generate`` and ``generate_batch``, on equal and on skewed lengths.

    python benchmarks/engine.py [--quick]

A Llama of 4 layers and hidden 256, vocabulary 8,192, fp32, two threads; 128 requests of 8 to 32 tokens, 32 at a time,
sampled at temperature 1. Equal: each answer has 64 tokens. Skewed: it has at most 256, and the end of a sequence is
likely at many places: half of the answers have some ten tokens, one in ten has 256. Counted are sampled tokens a
second, the best of the rounds; the sides take turns and begin with a round that is not counted, but ``generate_batch``,
which is slow, has one round.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from postlude.rollout.engine import Request, Sampling
from postlude.rollout.native import NativeEngine

SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 8192,
    "tie_word_embeddings": True,
}
REQUESTS, TOGETHER, END = 128, 32, 2
LENGTHS = {"equal": 64, "skewed": 256}
ROUNDS = 2


def model(skewed: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    causal = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SHAPE, eos_token_id=END)).eval()
    if skewed:
        with torch.no_grad():
            causal.get_input_embeddings().weight.mul_(4.0)[END].mul_(12.0)
    return causal


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(8, 33, (REQUESTS,), generator=generator).tolist()
    return [torch.randint(3, 8192, (length,), generator=generator).tolist() for length in lengths]


def ours(causal: torch.nn.Module, asked: list[list[int]], most: int, stops: frozenset[int]) -> int:
    requests = [Request(str(number), tuple(ids)) for number, ids in enumerate(asked)]
    made = NativeEngine(causal, batch=TOGETHER).generate(requests, Sampling(most, stops))
    return sum(len(one.tokens) for one in made)


def generate(causal: torch.nn.Module, asked: list[list[int]], most: int, stops: frozenset[int]) -> int:
    """Sorted by length, in batches, padded on the left."""
    config = GenerationConfig(
        max_new_tokens=most, do_sample=True, temperature=1.0, top_k=0, eos_token_id=list(stops) or None, pad_token_id=0
    )
    tokens = 0
    ordered = sorted(asked, key=len)
    for first in range(0, len(ordered), TOGETHER):
        some = ordered[first : first + TOGETHER]
        width = max(map(len, some))
        ids = torch.tensor([[0] * (width - len(one)) + one for one in some])
        mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in some])
        made = causal.generate(ids, attention_mask=mask, generation_config=config)[:, width:]
        for row in made.tolist():
            end = next((place + 1 for place, token in enumerate(row) if token in stops), len(row))
            tokens += end
    return tokens


def generate_batch(causal: torch.nn.Module, asked: list[list[int]], most: int, stops: frozenset[int]) -> int:
    """transformers' continuous batching."""
    config = GenerationConfig(
        max_new_tokens=most, do_sample=True, temperature=1.0, top_k=0, eos_token_id=list(stops) or -1, pad_token_id=0
    )
    made = causal.generate_batch(inputs=asked, generation_config=config, progress_bar=False)
    return sum(len(one.generated_tokens) for one in made.values())


SIDES: dict[str, Callable[..., int]] = {"generate": generate, "generate_batch": generate_batch, "native": ours}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round, without generate_batch")
    asked = parser.parse_args()
    torch.set_num_threads(2)
    table = Table(title="Sampled tokens a second, fp32, 2 threads")
    for column in ("lengths", *SIDES, "against generate", "against generate_batch"):
        table.add_column(column, justify="right")
    sides = {name: side for name, side in SIDES.items() if not (asked.quick and name == "generate_batch")}
    for kind, most in LENGTHS.items():
        causal, stops = model(kind == "skewed"), frozenset([END] if kind == "skewed" else [])
        best = dict.fromkeys(SIDES, float("nan"))
        for turn in range(2 if asked.quick else 1 + ROUNDS):
            for name, side in sides.items():
                if name == "generate_batch" and turn != ROUNDS:
                    continue
                begin = time.perf_counter()
                with torch.no_grad():
                    rate = side(causal, prompts(), most, stops) / (time.perf_counter() - begin)
                if turn:
                    best[name] = max(rate, best[name]) if best[name] == best[name] else rate
        table.add_row(
            kind,
            *(f"{best[name]:,.0f}" for name in SIDES),
            f"{best['native'] / best['generate']:.2f} times",
            f"{best['native'] / best['generate_batch']:.2f} times",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
