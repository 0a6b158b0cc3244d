"""The operations counted for an architecture, against torch's own counter on the real modules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from postlude.model.flops import ModelFlops, causal_pairs, packed_flops

LENGTH = 24


def measured(model) -> float:
    """Torch's count for one document through transformers' modules, forward and backward, head on every row.

    Run eagerly, attention is two products over the whole square of pairs.
    """
    ids = torch.arange(LENGTH)[None]
    with model.plain() as causal:
        causal.set_attn_implementation("eager")
        with FlopCounterMode(display=False) as counter:
            hidden = model.causal.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
            head = model.lm_head_parameters()
            logits = F.linear(hidden, head.weight[: head.vocabulary])
            if logits.requires_grad:
                logits.square().sum().backward()
    return counter.get_total_flops()


def counted_on_the_square(model) -> float:
    """Ours, had every token attended to every other one."""
    flops = ModelFlops(model)
    on_the_square = sum(flops.per_pair.values()) * LENGTH**2
    without_attention = flops.per_token * LENGTH + flops.per_row * LENGTH
    assert flops.count([LENGTH], LENGTH) < without_attention + on_the_square
    return without_attention + on_the_square


@pytest.mark.capability("Model FLOPs utilisation")
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "phi3", "gpt2", "qwen3_moe", "gpt_oss", "cohere"])
def test_training_everything(tiny, architecture):
    model = tiny(architecture, num_hidden_layers=3)
    if architecture in ("qwen3_moe", "gpt_oss"):
        model.causal.set_experts_implementation("eager")
    assert counted_on_the_square(model) == pytest.approx(measured(model), rel=0.02)


def _first_layers(model):
    frozen = [model.causal.get_input_embeddings(), *model.layers()[:2]]
    for module in frozen:
        module.requires_grad_(False)


class Adapted(nn.Module):
    """A frozen linear layer with a trained low-rank one beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 4, bias=False)
        self.up = nn.Linear(4, base.out_features, bias=False)

    def forward(self, hidden):
        return self.base(hidden) + self.up(self.down(hidden))


def _all_but_adapters(model):
    model.requires_grad_(False)
    for layer in model.layers():
        for module in (layer.self_attn, layer.mlp):
            for name, linear in list(module.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(module, name, Adapted(linear))


def _all_but_the_head(model):
    model.requires_grad_(False)
    model.causal.get_output_embeddings().requires_grad_(True)


def _everything(model):
    model.requires_grad_(False)


@pytest.mark.parametrize("freeze", [_first_layers, _all_but_adapters, _all_but_the_head, _everything])
def test_training_a_part(tiny, freeze):
    model = tiny("llama", num_hidden_layers=4, tie_word_embeddings=False)
    freeze(model)
    assert counted_on_the_square(model) == pytest.approx(measured(model), rel=0.02)


@given(length=st.integers(0, 80), window=st.none() | st.integers(1, 90))
def test_pairs_are_those_of_the_mask(length, window):
    row, column = torch.arange(length)[:, None], torch.arange(length)
    seen = column <= row
    if window is not None:
        seen &= column > row - window
    assert causal_pairs(length, window) == int(seen.sum())


def test_a_batch_counts_documents_trained_rows_and_no_padding(tiny, pack):
    model = tiny("gemma3_text", layer_types=["sliding_attention", "full_attention"])
    count = packed_flops([model])
    batch = pack([30, 7])
    flops = ModelFlops(model)
    rows = int((batch.weight > 0).sum())
    pairs = {5: causal_pairs(30, 5) + causal_pairs(7, 5), None: 30 * 31 // 2 + 7 * 8 // 2}
    attention = sum(flops.per_pair[window] * number for window, number in pairs.items())
    assert count(batch) == flops.per_token * 37 + attention + flops.per_row * rows
    assert count(pack([30, 7], pad_to=64)) == count(batch)
    assert packed_flops([model, model])(batch) == 2 * count(batch)


def test_a_language_head_that_is_not_used_is_not_counted(tiny, pack):
    model = tiny("llama")
    batch = pack([30, 7])
    with_head, without = packed_flops([model])(batch), packed_flops([model], headless=[model])(batch)
    assert with_head - without == ModelFlops(model).per_row * int(batch.weight.count_nonzero()) > 0
