"""Packing against padded batches, on the most skewed lengths of the shared data: effective tokens per second.

    python benchmarks/packing.py

The same Qwen3 (2 layers, hidden 128, vocabulary 8,192, fp32, 2 threads) computes loss and gradients of the same
documents: in padded batches of 16 in data order and grouped by length, through transformers' own forward pass, and
packed through ours. Effective tokens are those of the documents. Rounds are interleaved; medians are shown.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from postlude.data.batch import collate
from postlude.data.document import Document, Unit
from postlude.data.example import texts_of
from postlude.data.formats.sharegpt import ShareGPT
from postlude.data.formats.tree import Tree
from postlude.data.packing import best_fit
from postlude.data.sources.path import Path as PathSource
from postlude.data.tokenizer import load_tokenizer
from postlude.manifest.schema import ModelFrom, NewModel
from postlude.model.load import load_model
from postlude.objectives.nll import WeightedLikelihood
from postlude.training.meters import Phases
from postlude.training.precision import LossScale, Precision
from postlude.training.program import Program, Role
from postlude.training.step import Executor
from postlude.training.workers import Workers

SHARED = Path(os.environ.get("POSTLUDE_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
VOCABULARY, BLOCK, BATCH, ROUNDS = 8192, 4096, 16, 3
SOURCES = {
    "oasst_100_trees": ("oasst_100_trees/en_100_tree.jsonl", Tree(paths="all")),
    "toolcall_sft": ("toolcall_sft/glaive_toolcall_en_demo.json", ShareGPT(roles="any")),
    "gsm8k": ("gsm8k/train.jsonl", None),
}


def lengths_of(name: str) -> list[int]:
    """Tokens of each conversation of a data set, with a real tokenizer."""
    path, form = SOURCES[name]
    tokenizer = load_tokenizer(str(SHARED / "tokenizers" / "qwen2.5"))
    records = PathSource(path=str(SHARED / path)).open("build/benchmarks")
    texts = []
    for group in range(len(records.groups)):
        for record in records.read(group):
            if form is None:
                texts.append(f"{record['question']}\n{record['answer']}")
            else:
                texts += ["\n".join(texts_of(example)) for example in form.parse(record)]
    return [max(2, min(len(ids), BLOCK)) for ids in tokenizer(texts).input_ids]


def waste(lengths: Sequence[int]) -> float:
    """Padded tokens for each real one, in batches in data order."""
    padded = sum(len(part) * max(part) for part in _batches(lengths))
    return padded / sum(lengths)


def _batches(items: Sequence[int]) -> Iterator[Sequence[int]]:
    return (items[start : start + BATCH] for start in range(0, len(items), BATCH))


def main() -> None:
    torch.set_num_threads(2)
    lengths = max((lengths_of(name) for name in SOURCES), key=waste)
    rng = np.random.default_rng(0)
    lengths = [lengths[i] for i in rng.permutation(len(lengths))[:96]]
    tokens = [rng.integers(0, VOCABULARY, n) for n in lengths]
    shape = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 1, "head_dim": 64, "vocab_size": VOCABULARY, "tie_word_embeddings": True}
    model = load_model(ModelFrom(new=NewModel(architecture="qwen3", config=shape)), None, None, seed=0)
    program = Program(WeightedLikelihood(), {"policy": Role(model, object())})  # type: ignore[arg-type]
    executor = Executor(program, Workers(), Precision("fp32", "a benchmark"), Phases(), lambda batch: 0.0)
    documents = [
        Unit((Document(f"d:{i}", "d", row, {"weight": np.ones(len(row), np.float32)}),)) for i, row in enumerate(tokens)
    ]
    blocks = [tuple(documents[i] for i in block) for block in best_fit([len(row) for row in tokens], BLOCK)]
    fill = sum(lengths) / (len(blocks) * BLOCK)
    batches = [collate([block]) for block in blocks]
    grouped = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    ways = {
        "padded, data order": lambda: padded(model, tokens, list(range(len(tokens)))),
        "padded, grouped by length": lambda: padded(model, tokens, grouped),
        "packed": lambda: executor.forward_backward(batches, LossScale(Precision("fp32", ""))),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, run in ways.items():
            model.zero_grad()
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    table = Table(title=f"{len(lengths)} documents, {sum(lengths):,} tokens; packing fills {fill:.1%}")
    for column in ("way", "effective tok/s", "packed is faster by"):
        table.add_column(column, justify="right")
    packed = statistics.median(seconds["packed"])
    for name, taken in seconds.items():
        median = statistics.median(taken)
        table.add_row(name, f"{sum(lengths) / median:,.0f}", f"{median / packed:.2f}")
    Console().print(table)


def padded(model, tokens: Sequence[np.ndarray], order: Sequence[int]) -> None:
    """Forward and backward over padded batches, as transformers does it."""
    with model.plain() as causal:
        for part in _batches(order):
            longest = max(len(tokens[i]) for i in part)
            ids = torch.zeros(len(part), longest, dtype=torch.int64)
            labels = torch.full_like(ids, -100)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(part):
                n = len(tokens[i])
                ids[row, :n] = labels[row, :n] = torch.from_numpy(tokens[i])
                mask[row, :n] = 1
            causal(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()


if __name__ == "__main__":
    main()
