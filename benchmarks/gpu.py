"""What one GPU does: tokens a second, model FLOP utilisation (MFU) and peak memory of training; the head; attention.

    python benchmarks/gpu.py CASE [--compile] [--steps 8]      one case, in a few minutes
    python benchmarks/gpu.py --list
    python benchmarks/gpu.py --tiny                            every case at toy size, on the CPU: that its code runs

Random weights, blocks of 8,192 tokens packed with documents of skewed lengths, vocabulary 151,936. Training is the
project's own executor, head, attention, optimiser and adapters; MFU counts the operations that the architecture needs
(:mod:`postlude.model.flops`) against 989 TFLOP/s, the dense bf16 peak of an H100 or H200. Goal: 50 % for ``sft-4b`` and
``lora-8b``. Ray is not imported; where pydantic and ruamel.yaml are not installed they have to be brought.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

PEAK_FLOPS = 989e12
BLOCK, VOCABULARY = 8192, 151_936
QWEN3 = {"head_dim": 128, "num_key_value_heads": 8, "tie_word_embeddings": True}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "1.7b": (
        "qwen3",
        dict(QWEN3, hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16),
    ),
    "4b": (
        "qwen3",
        dict(QWEN3, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32),
    ),
    "8b": (
        "llama",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
    ),
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@dataclass(frozen=True)
class Place:
    """Where, and how large."""

    device: torch.device
    tiny: bool
    compile: bool
    steps: int

    @property
    def block(self) -> int:
        return 128 if self.tiny else BLOCK

    @property
    def vocabulary(self) -> int:
        return 512 if self.tiny else VOCABULARY

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peak(self) -> float:
        """GB that tensors have had at most since the last call."""
        if self.device.type != "cuda":
            return float("nan")
        peak = torch.cuda.max_memory_allocated() / 1e9
        torch.cuda.reset_peak_memory_stats()
        return peak


def blocks(place: Place, count: int) -> list[Any]:
    """Packed batches of one block each, every token trained but the first of a document."""
    from postlude.data.batch import collate
    from postlude.data.document import Document, Unit

    rng = np.random.default_rng(0)
    made = []
    for number in range(count):
        units, left = [], place.block
        while left > 1:
            length = min(left, max(2, int(rng.lognormal(6.0 if not place.tiny else 3.0, 1.0))))
            weight = np.ones(length, dtype=np.float32)
            weight[0] = 0
            tokens = rng.integers(0, place.vocabulary, length)
            units.append(Unit((Document(f"{number}:{left}", "made", tokens, {"weight": weight}),)))
            left -= length
        made.append(collate([tuple(units)], pad_to=place.block))
    return made


def train(place: Place, shape: str, adapter: bool, recompute: str) -> dict[str, Any]:
    """Steps of one block each."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from postlude.manifest.adapter import Adapter
    from postlude.model.adapters.start import Start, attach
    from postlude.model.attached import AdapterRequest
    from postlude.model.flops import packed_flops
    from postlude.model.language_model import LanguageModel
    from postlude.objectives.nll import NegativeLogLikelihood
    from postlude.training.meters import Phases
    from postlude.training.optimizers import AdamW
    from postlude.training.precision import LossScale, Precision
    from postlude.training.program import Program, Role
    from postlude.training.step import Executor
    from postlude.training.workers import Workers

    architecture, keys = SHAPES[shape]
    config = AutoConfig.for_model(
        architecture, **{**keys, **(TINY if place.tiny else {}), "vocab_size": place.vocabulary}
    )
    held = torch.bfloat16 if adapter else torch.float32
    with place.device:
        causal = AutoModelForCausalLM.from_config(config, dtype=held)
    model = LanguageModel(causal, torch.bfloat16)
    if adapter:
        attach(model, Start(AdapterRequest(Adapter(rank=16), 0, lambda stored: held), "random"))
        model.to(place.device)
    if recompute != "none":
        model.recompute_layers(recompute)
    if place.compile:
        model.compile_layers()
    model.make_trainable(True)
    model.train()
    optimizer = AdamW(lr=1e-4)
    workers, precision = Workers(device=place.device), Precision("bf16", "a benchmark")
    program = Program(NegativeLogLikelihood().build(), {"policy": Role(model, optimizer)})
    executor = Executor(program, workers, precision, Phases(), packed_flops([model]))
    (update,) = optimizer.build([(n, p) for n, p in model.named_parameters() if p.requires_grad])
    scale = LossScale(precision)
    work = blocks(place, place.steps + 3)
    seconds, losses, flops = [], [], 0.0
    for number, batch in enumerate(work):
        place.synchronize()
        begin = time.perf_counter()
        result = executor.forward_backward([batch], scale)
        executor.clip(result.grad_norms, 1.0)
        update.step()
        update.zero_grad()
        place.synchronize()
        if number >= 3:
            seconds.append(time.perf_counter() - begin)
            flops += result.counts["flops"]
        losses.append(result.loss)
    return {
        "tokens_per_second": place.block * len(seconds) / sum(seconds),
        "mfu": flops / sum(seconds) / PEAK_FLOPS,
        "peak_gb": place.peak(),
        "losses": [losses[0], losses[-1]],
    }


def head(place: Place, vocabulary: int) -> dict[str, Any]:
    """The head alone, forward and backward, every row trained, against full logits and torch's own."""
    from postlude.objectives.head import FusedHead

    rows, width = (256, 64) if place.tiny else (8192, 2560)
    vocabulary = 512 if place.tiny else vocabulary
    dtype = torch.float32 if place.device.type == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    hidden = torch.randn(rows, width, device=place.device, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, device=place.device).mul_(0.02).requires_grad_()
    targets = torch.randint(vocabulary, (rows,), device=place.device)
    each = torch.full((rows,), 1 / rows, device=place.device)

    def ours() -> torch.Tensor:
        with torch.autocast(place.device.type, dtype=torch.bfloat16, enabled=not place.tiny):
            return FusedHead(weight, upstream=1.0).negative_log_likelihood(hidden, targets, each)[0]

    def full() -> torch.Tensor:
        return F.cross_entropy((hidden @ weight.to(dtype).T).float(), targets)

    sides: dict[str, Callable[[], torch.Tensor]] = {"ours": ours, "full logits": full}
    torchs = getattr(F, "linear_cross_entropy", None)
    if torchs is not None:
        sides["torch"] = lambda: torchs(hidden, weight.to(dtype), targets)
    return {name: timed(place, side, [hidden, weight]) for name, side in sides.items()}


def attention(place: Place) -> dict[str, Any]:
    """Attention over a pack of documents, forward and backward, against the same documents padded to the longest."""
    from postlude.model import kernels
    from postlude.model.attention import Documents

    heads, shared, width = (4, 2, 16) if place.tiny else (32, 8, 128)
    dtype = torch.float32 if place.device.type == "cpu" else torch.bfloat16
    lengths = blocks(place, 1)[0].lengths
    lengths = lengths[lengths > 0]
    documents, total = Documents.of(lengths, place.device), int(lengths.sum())
    torch.manual_seed(0)
    made = [torch.randn(total, n, width, device=place.device, dtype=dtype) for n in (heads, shared, shared)]
    packed = [tensor.requires_grad_() for tensor in made]
    longest = int(lengths.max())
    padded = [
        torch.nn.utils.rnn.pad_sequence(list(tensor.detach().split(lengths.tolist())), batch_first=True)
        .transpose(1, 2)
        .requires_grad_()
        for tensor in made
    ]

    def ours() -> torch.Tensor:
        bounds = (documents.lengths, documents.offsets)
        if place.device.type == "cuda":
            return kernels.varlen(*packed, documents.offsets, documents.longest, width**-0.5, None)[0].sum()
        return kernels.document_attention(*packed, None, *bounds, width**-0.5, None)[0].sum()

    def with_padding() -> torch.Tensor:
        return F.scaled_dot_product_attention(*padded, is_causal=True, enable_gqa=True).sum()

    return {
        "documents": len(lengths),
        "longest": longest,
        "ours": timed(place, ours, packed),
        "padded": timed(place, with_padding, padded),
    }


def timed(place: Place, side: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> dict[str, float]:
    """Milliseconds of a forward and backward pass, the median, and GB at its peak."""
    spent = []
    for number in range(place.steps + 3):
        for leaf in leaves:
            leaf.grad = None
        place.synchronize()
        begin = time.perf_counter()
        side().backward()
        place.synchronize()
        if number >= 3:
            spent.append(1000 * (time.perf_counter() - begin))
    return {"ms": float(np.median(spent)), "peak_gb": place.peak()}


CASES: dict[str, Callable[[Place], dict[str, Any]]] = {
    "sft-1.7b": lambda place: train(place, "1.7b", adapter=False, recompute="none"),
    "sft-1.7b-selective": lambda place: train(place, "1.7b", adapter=False, recompute="selective"),
    "sft-4b": lambda place: train(place, "4b", adapter=False, recompute="layer"),
    "lora-8b": lambda place: train(place, "8b", adapter=True, recompute="selective"),
    "head-152k": lambda place: head(place, 151_936),
    "head-256k": lambda place: head(place, 262_144),
    "attention": attention,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE")
    parser.add_argument("--compile", action="store_true", help="compile each layer")
    parser.add_argument("--steps", type=int, default=8, help="measured ones, after three")
    parser.add_argument("--list", action="store_true", help="name the cases")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, on the CPU")
    asked = parser.parse_args()
    if asked.list:
        print("\n".join(CASES))
        return
    if not asked.tiny and not torch.cuda.is_available():
        raise SystemExit("There is no GPU here. --tiny runs every case at toy size on the CPU.")
    place = Place(
        torch.device("cpu" if asked.tiny else "cuda"), asked.tiny, asked.compile, 2 if asked.tiny else asked.steps
    )
    for name in asked.cases or (CASES if asked.tiny else []):
        print(json.dumps({"case": name, "compile": asked.compile, **CASES[name](place)}), flush=True)


if __name__ == "__main__":
    main()
