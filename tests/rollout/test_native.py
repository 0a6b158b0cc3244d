"""The native engine against transformers: the same greedy tokens, and log-probabilities of the whole sequence."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from postlude.manifest.problem import ManifestError
from postlude.manifest.schema import ModelFrom, NewModel
from postlude.model.load import load_causal, load_model
from postlude.rollout.engine import Completion, Request, Sampling
from postlude.rollout.native import NativeEngine

PROMPTS = [[1, 403, 407, 261], [1, 317], [1, 291, 400, 313, 259, 390, 262, 401, 5], [1, 385], [1, 403, 407, 261, 378]]
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
ARCHITECTURES = {
    "llama": SHAPE,
    "qwen3": {**SHAPE, "head_dim": 8, "num_key_value_heads": 2},
    "gemma3_text": {
        **SHAPE,
        "head_dim": 8,
        "num_key_value_heads": 2,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}


def requests(samples: int = 1) -> list[Request]:
    return [Request(str(i), tuple(ids), sample) for i, ids in enumerate(PROMPTS) for sample in range(samples)]


def new(architecture: str) -> PreTrainedModel:
    config = {**ARCHITECTURES[architecture], "vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2}
    return load_causal(ModelFrom(new=NewModel(architecture=architecture, config=config)), None, None, seed=1)


@pytest.fixture
def stories(shared_data) -> PreTrainedModel:
    place = str(shared_data / "models" / "stories260K_hf")
    return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)


def of_transformers(causal: PreTrainedModel, ids: Sequence[int], tokens: int) -> list[int]:
    made = causal.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return made[0, len(ids) :].tolist()


@torch.no_grad()
def log_probabilities(causal: PreTrainedModel, completion: Completion, temperature: float) -> torch.Tensor:
    """Of the completion's tokens, from one forward pass over prompt and completion."""
    ids = torch.tensor([[*completion.request.tokens, *completion.tokens]])
    rows = (causal(ids).logits[0] / temperature).log_softmax(-1)
    start = len(completion.request.tokens)
    return rows[start - 1 : -1].gather(1, ids[0, start:, None])[:, 0]


@pytest.mark.capability("A native engine that generates in batches")
def test_greedy_tokens_are_those_of_transformers_on_a_trained_model(stories):
    sampling = Sampling(48, frozenset([2]), temperature=0)
    for completion in NativeEngine(stories, batch=3).generate(requests(), sampling):
        assert list(completion.tokens) == of_transformers(stories, completion.request.tokens, 48)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_tokens_are_those_of_transformers(architecture):
    causal = new(architecture)
    sampling = Sampling(20, frozenset([2]), temperature=0)
    for completion in NativeEngine(causal, batch=8).generate(requests(), sampling):
        assert list(completion.tokens) == of_transformers(causal, completion.request.tokens, 20)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_log_probabilities_are_those_of_the_whole_sequence(architecture):
    causal = new(architecture)
    sampling = Sampling(24, frozenset(range(20)), temperature=0.8, top_p=0.95, seed=4)
    completions = NativeEngine(causal, batch=16).generate(requests(3), sampling)
    assert len({completion.tokens for completion in completions}) > 10
    for completion in completions:
        found = torch.tensor(completion.log_probabilities)
        assert torch.allclose(found, log_probabilities(causal, completion, 0.8), atol=1e-4)


@pytest.mark.capability("A completion does not depend on what is generated beside it")
def test_a_completion_does_not_depend_on_its_batch(stories):
    sampling = Sampling(60, frozenset([2, 13, 430]), temperature=0.9, top_p=0.9, seed=7)
    together = NativeEngine(stories, batch=64).generate(requests(6), sampling)
    few = NativeEngine(stories, batch=4).generate(requests(6)[::-1], sampling)[::-1]
    alone = [NativeEngine(stories, batch=1).generate([request], sampling)[0] for request in requests(6)[7:19]]
    assert [one.tokens for one in together] == [one.tokens for one in few]
    assert [one.tokens for one in together[7:19]] == [one.tokens for one in alone]
    assert len({len(one.tokens) for one in together}) > 5  # they left the batch at different times


def test_why_it_ended(stories):
    sampling = Sampling(30, frozenset([430]), temperature=1.0, seed=3)
    completions = NativeEngine(stories).generate(requests(8), sampling)
    assert {one.ended for one in completions} == {"stop", "length"}
    for one in completions:
        assert (one.tokens[-1] == 430) == (one.ended == "stop")
        assert 430 not in one.tokens[:-1]
        assert len(one.tokens) == len(one.log_probabilities)
        assert len(one.tokens) == 30 or one.ended == "stop"


def test_the_seed_and_the_sample_change_what_is_drawn(stories):
    def texts(seed: int) -> list[tuple[int, ...]]:
        sampling = Sampling(12, frozenset(), temperature=1.0, seed=seed)
        return [one.tokens for one in NativeEngine(stories).generate(requests(4), sampling)]

    assert texts(0) == texts(0)
    assert texts(0) != texts(1)
    assert len(set(texts(0))) > 15


def test_a_context_ends_a_completion_and_refuses_a_prompt_that_fills_it():
    causal = new("gpt2")
    engine = NativeEngine(causal)
    assert engine.context == 64
    sampling = Sampling(100, frozenset(), temperature=0)
    (completion,) = engine.generate([Request("long", tuple(range(3, 63)))], sampling)
    assert (len(completion.tokens), completion.ended) == (4, "length")
    with pytest.raises(ValueError, match="leaves no room in a context of 64"):
        engine.generate([Request("full", tuple(range(3, 67)))], sampling)
    with pytest.raises(ValueError, match="has no tokens"):
        engine.generate([Request("empty", ())], sampling)


def test_a_model_in_training_is_asked_without_its_padding_and_goes_on_training():
    config = {**SHAPE, "vocab_size": 500, "attention_dropout": 0.5}
    model = load_model(ModelFrom(new=NewModel(architecture="llama", config=config)), None, None, seed=0).train()
    assert len(model.causal.get_output_embeddings().weight) > model.vocabulary
    sampling = Sampling(16, frozenset(), temperature=50.0, seed=1)  # almost even over the vocabulary
    with model.plain() as causal:
        engine = NativeEngine(causal, model.vocabulary)
        once, again = (engine.generate(requests(20), sampling) for _ in range(2))
    assert model.training
    assert [one.tokens for one in once] == [one.tokens for one in again]
    assert max(max(one.tokens) for one in once) < 500
    assert all(not parameter.grad_fn for parameter in model.parameters())


def test_an_architecture_without_keys_and_values_is_refused():
    config = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "vocab_size": 512}
    causal = load_causal(ModelFrom(new=NewModel(architecture="mamba", config=config)), None, None, seed=0)
    with pytest.raises(ManifestError, match="'mamba' keeps no cache"):
        NativeEngine(causal).generate(requests(), Sampling(4, frozenset()))
