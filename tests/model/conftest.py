"""Tiny models of many architectures, and packs of random documents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from postlude.data.batch import PackedBatch, collate
from postlude.data.document import Document, Unit
from postlude.model.language_model import LanguageModel

VOCABULARY = 100

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "sliding_window": 5,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 512,
    "ffn_dim": 96,
    "word_embed_proj_dim": 64,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""A small model in the words of most configurations; each takes the keys that it knows."""


def build_causal(architecture: str, seed: int = 0, **changes: Any) -> Any:
    """A transformers model with random weights large enough that nothing hides in rounding."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from postlude.model.places import configuration_keys

    known = configuration_keys(architecture)
    keys = {**{key: value for key, value in SHAPE.items() if key in known}, **changes}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **keys), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * (1.0 if "sink" in name else 0.1))
    return model.eval()


@pytest.fixture
def tiny_causal() -> Callable[..., Any]:
    return build_causal


@pytest.fixture
def tiny() -> Callable[..., LanguageModel]:
    def build(architecture: str, seed: int = 0, **changes: Any) -> LanguageModel:
        return LanguageModel(build_causal(architecture, seed, **changes))

    return build


@pytest.fixture
def pack() -> Callable[..., PackedBatch]:
    def build(
        lengths: Sequence[int], vocabulary: int = VOCABULARY, pad_to: int | None = None, seed: int = 0
    ) -> PackedBatch:
        generator = np.random.default_rng(seed)
        units = []
        for index, length in enumerate(lengths):
            weight = (generator.random(length) < 0.6).astype(np.float32)
            document = Document(f"test:{index}", "test", generator.integers(0, vocabulary, length), {"weight": weight})
            units.append((Unit((document,)),))
        return collate(units, pad_to=pad_to)

    return build
