"""The model as the trainer uses it: recomputation, compilation, heads, limits."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from postlude.errors import DataError
from postlude.model import recompute, vocabulary

LENGTHS = (7, 1, 24)


def states_and_gradients(model, batch):
    hidden = model.hidden(batch)
    (hidden * torch.linspace(-1, 1, hidden.shape[-1])).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return hidden.detach(), gradients


@pytest.mark.capability("Recomputation of layers in the backward pass")
@pytest.mark.parametrize("kind", ["layer", "selective"])
@pytest.mark.parametrize("architecture", ["qwen3", "gpt_oss", "gpt2"])
def test_recomputation_changes_no_bit(tiny, pack, architecture, kind):
    batch = pack(LENGTHS)
    plain, recomputed = tiny(architecture).train(), tiny(architecture).train()
    recomputed.recompute_layers(kind)
    calls: list[int] = []
    attention = recomputed.layers()[0].get_submodule("attn" if architecture == "gpt2" else "self_attn")
    attention.register_forward_hook(lambda *_: calls.append(1))
    for seed in (1, 2):  # dropout, where an architecture has it, is drawn again the same
        torch.manual_seed(seed)
        expected = states_and_gradients(plain, batch)
        torch.manual_seed(seed)
        got = states_and_gradients(recomputed, batch)
        assert torch.equal(got[0], expected[0])
        assert all(torch.equal(got[1][name], gradient) for name, gradient in expected[1].items())
    assert len(calls) == 4


class Calls(TorchDispatchMode):
    """Counts how often operators are called that matter for time."""

    def __init__(self) -> None:
        super().__init__()
        self.counted = Counter()

    def __torch_dispatch__(self, operator, types, arguments=(), named=None):
        self.counted[str(operator)] += operator in recompute.KEPT
        return operator(*arguments, **(named or {}))


@pytest.mark.capability("Recomputation of layers in the backward pass")
def test_selective_recomputation_makes_no_product_again(tiny, pack):
    batch, counted = pack(LENGTHS), {}
    for kind in ("none", "selective", "layer"):
        model = tiny("qwen3").train()
        if kind != "none":
            model.recompute_layers(kind)
        with Calls() as calls:
            states_and_gradients(model, batch)
        counted[kind] = calls.counted
    assert counted["selective"] == counted["none"]
    assert counted["layer"]["aten.mm.default"] > counted["none"]["aten.mm.default"]
    assert counted["layer"]["postlude.document_attention.default"] == 2 * len(tiny("qwen3").layers())


@pytest.mark.capability("Recomputation to a share of the memory, found by the compiler")
def test_the_smaller_the_budget_the_less_is_kept(tiny, pack, monkeypatch):
    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_module(self, backend="aot_eager_decomp_partition"))
    batch, kept, results = pack(LENGTHS, pad_to=64), {}, {}
    for budget in (1.0, 0.5, 0.0):
        torch._dynamo.reset()
        model, sizes = tiny("qwen3").train(), {}
        model.compile_layers(budget)

        def keep(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            results[budget] = states_and_gradients(model, batch)
        kept[budget] = sum(sizes.values())
    model.compile_layers()
    assert kept[0.0] < kept[0.5] < kept[1.0]
    for budget in (0.5, 0.0):
        for name, gradient in results[1.0][1].items():
            torch.testing.assert_close(results[budget][1][name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.capability("Compiled layers that do not recompile for each pack")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_another_pack_needs_no_other_code(tiny, pack, monkeypatch, backend):
    from torch._dynamo.utils import counters

    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_module(self, backend=backend))
    torch._dynamo.reset()
    counters.clear()
    model, reference = tiny("gemma3_text", num_hidden_layers=3), tiny("gemma3_text", num_hidden_layers=3)
    model.compile_layers()
    packs = [(7, 20, 30, 7), (30, 34), (1,) * 64, (60, 4), (5, 6, 7, 8, 9)]
    frames = []
    for seed, lengths in enumerate(packs):
        batch = pack(lengths, pad_to=64, seed=seed)
        got, expected = states_and_gradients(model, batch), states_and_gradients(reference, batch)
        torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-4)
        for name, gradient in expected[1].items():
            torch.testing.assert_close(got[1][name], gradient, rtol=1e-3, atol=1e-3)
        frames.append(counters["frames"]["total"])
    assert frames == frames[:1] * len(packs)
    assert not counters["graph_break"]


def test_the_scalar_head_is_equal_on_every_rank_and_trained(tiny, pack):
    first, second = tiny("llama"), tiny("llama")
    with pytest.raises(KeyError):
        first.head("scalar")
    for model in (first, second):
        torch.manual_seed(id(model))
        model.add_scalar_head()
        model.add_scalar_head()
    batch = pack(LENGTHS)
    values = first.head("scalar")(first.hidden(batch))
    assert values.shape == (sum(LENGTHS),)
    assert torch.equal(values, second.head("scalar")(second.hidden(batch)))
    values.sum().backward()
    assert "scalar.weight" in {name for name, p in first.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("architecture", "changes", "limit"),
    [
        ("gpt2", {}, 512),
        ("opt", {"max_position_embeddings": 40}, 40),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, 512),
        ("llama", {}, None),
    ],
)
def test_a_document_longer_than_the_positions_is_refused(tiny, pack, architecture, changes, limit):
    model = tiny(architecture, **changes)
    assert model.anatomy.longest_document == limit
    if limit is None:
        model.hidden(pack([600]))
        return
    model.hidden(pack([limit, 3], pad_to=limit + 10))
    with pytest.raises(DataError, match=f"'test:1' has {limit + 1} tokens.*{limit}"):
        model.hidden(pack([3, limit + 1]))


def test_padding_of_the_vocabulary_is_only_inside(tiny, pack):
    model = tiny("llama", vocab_size=100, tie_word_embeddings=False)
    assert (model.vocabulary, vocabulary.rows(model.causal), model.config.vocab_size) == (100, 128, 100)
    head = model.lm_head_parameters()
    assert head.weight.shape == (128, 64)
    assert head.vocabulary == 100
    assert not head.weight[100:].any()
    assert model.logits(model.hidden(pack(LENGTHS))).shape == (sum(LENGTHS), 100)


def test_tied_weights_stay_tied(tiny):
    model = tiny("qwen3", tie_word_embeddings=True)
    assert model.lm_head_parameters().weight is model.causal.get_input_embeddings().weight
    assert sum(p.shape[0] == 128 for p in model.parameters()) == 1


@pytest.mark.parametrize(
    ("architecture", "changes", "scale", "soft_cap"),
    [
        ("llama", {}, 1.0, None),
        ("gemma2", {"final_logit_softcapping": 25.0}, 1.0, 25.0),
        ("granite", {"logits_scaling": 8.0}, 0.125, None),
        ("cohere", {"logit_scale": 0.5}, 0.5, None),
    ],
)
def test_what_a_head_does_to_its_logits_is_found_out(tiny, architecture, changes, scale, soft_cap):
    head = tiny(architecture, **changes).lm_head_parameters()
    assert (head.scale, head.soft_cap) == (scale, soft_cap)


def test_documents_do_not_see_each_other_in_the_states(tiny, pack):
    model = tiny("gemma2")
    first, second = pack([9, 12], seed=1), pack([9, 12], seed=2)
    second.tokens[9:] = first.tokens[9:]
    assert torch.equal(model.hidden(first)[9:], model.hidden(second)[9:])


def test_an_empty_batch_runs(tiny, pack):
    hidden = tiny("llama").hidden(pack([]))
    assert hidden.shape == (1, 64)
