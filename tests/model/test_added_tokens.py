"""New tokens: where their rows begin, that nothing else changes, and that they are trained, written and read."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import meshes
from postlude.data.tokenizer import NewTokens, load_tokenizer, with_new_tokens
from postlude.manifest.problem import ManifestError
from postlude.manifest.schema import ModelFrom, TokenizerFrom
from postlude.model.load import load_model
from ranks import run_ranks

pytestmark = pytest.mark.capability("New tokens in a model that is there")
TOKENS = NewTokens(ids=(150, 140, 152), pieces=((3, 5, 5), (7,), ()))
"""One after the last row, one in a row that is there, one of which nothing is known; and a row that no token has."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    meshes.write_checkpoints(folder, ("llama", "qwen3 tied"))
    return folder


@pytest.mark.parametrize("name", ["llama", "qwen3 tied"])
def test_a_row_begins_as_the_mean_of_its_pieces(bases, name) -> None:
    before = AutoModelForCausalLM.from_pretrained(bases / name)
    grown = load_model(ModelFrom(path="x"), str(bases / name), None, seed=0, new_tokens=TOKENS)
    assert grown.vocabulary == grown.config.vocab_size == 153
    for old, new in (
        (before.get_input_embeddings().weight, grown.causal.get_input_embeddings().weight),
        (before.get_output_embeddings().weight, grown.causal.get_output_embeddings().weight),
    ):
        kept = [row for row in range(150) if row != 140]
        assert torch.equal(new[kept], old[kept])
        torch.testing.assert_close(new[150], old[[3, 5, 5]].mean(0))
        assert torch.equal(new[140], old[7])
        torch.testing.assert_close(new[152], old.mean(0))
        assert not new[151].any()
    tied = grown.causal.get_input_embeddings().weight is grown.causal.get_output_embeddings().weight
    assert tied == (name == "qwen3 tied")


def test_the_logits_of_other_tokens_stay(bases) -> None:
    ids = torch.randint(100, (1, 8), generator=torch.Generator().manual_seed(0))
    grown = load_model(ModelFrom(path="x"), str(bases / "llama"), None, seed=0, new_tokens=TOKENS)
    before = AutoModelForCausalLM.from_pretrained(bases / "llama")
    with torch.no_grad(), grown.plain() as causal:
        torch.testing.assert_close(causal(input_ids=ids).logits[..., :140], before(input_ids=ids).logits[..., :140])


@pytest.mark.parametrize("tensor", [1, 2])
def test_ranks_give_their_parts_the_same_rows(bases, tensor) -> None:
    grown = load_model(ModelFrom(path="x"), str(bases / "llama"), None, seed=0, new_tokens=TOKENS)
    task = meshes.Growing(str(bases / "llama"), TOKENS, tensor)
    for found in run_ranks("meshes:grown_rows", task, 2):
        for name in ("embed_tokens", "lm_head"):
            module = grown.causal.get_input_embeddings() if name == "embed_tokens" else grown.causal.lm_head
            torch.testing.assert_close(torch.from_numpy(found[name]), module.weight.detach())


def test_a_token_is_one_wherever_it_stands() -> None:
    plain = load_tokenizer(TokenizerFrom(bytes=True))
    grown, tokens = with_new_tokens(plain, ["<item-7>", "<|end|>"])
    assert tokens.pieces == tuple(tuple(plain.encode(t, add_special_tokens=False)) for t in ("<item-7>", "<|end|>"))
    assert grown.encode("a<item-7><|end|>", add_special_tokens=False)[-2:] == list(tokens.ids)
    assert grown.decode(list(tokens.ids)) == "<item-7><|end|>"
    assert len(plain.get_vocab()) + 2 == len(grown.get_vocab())


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (["a"], "vocabulary already"),
        (["<x>", "<x>"], "twice"),
        ([" "], "is empty"),
        (["né"], "write the token 'né' back"),
    ],
)
def test_tokens_that_cannot_be_added_are_named(tokens, said) -> None:
    with pytest.raises(ManifestError, match=said):
        with_new_tokens(load_tokenizer(TokenizerFrom(bytes=True)), tokens)


@pytest.mark.filterwarnings("ignore")
def test_a_stage_adds_tokens_trains_them_and_the_next_has_them(tmp_path) -> None:
    import json

    from postlude.runs import Run
    from postlude.workflow.run import run
    from postlude.workflow.validate import validate

    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    rows = [{"text": f"<item-{n % 3}> goes with <item-{(n + 1) % 3}>"} for n in range(24)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tokens.txt").write_text("<item-0>\n<item-1>\n<item-2>\n")
    stage = {"recipe": "sft", "data": {"texts": 1.0}, "batch": {"tokens": 256, "block": 128}, "threads": 1}
    manifest = {
        "name": "grown",
        "run_dir": str(tmp_path / "runs"),
        "data": {"texts": {"source": {"path": str(tmp_path / "texts.jsonl")}, "format": "text"}},
        "stages": {
            "base": {
                **stage,
                "model": {"new": {"architecture": "llama", "config": shape}},
                "tokenizer": {"bytes": True},
                "steps": 1,
            },
            "grown": {
                **stage,
                "model": {"from": "base"},
                "add_tokens": {"path": str(tmp_path / "tokens.txt")},
                "steps": 3,
                "optimizer": {"lr": 1e-2},
            },
            "next": {**stage, "model": {"from": "grown"}, "steps": 1},
        },
    }
    path = tmp_path / "grown.yaml"
    path.write_text(json.dumps(manifest))
    assert validate(str(path), []).error is None
    assert run(str(path), [], inline=True) == 0
    done = Run(f"{tmp_path}/runs/grown")
    for name in ("grown", "next"):
        place = done.stage(name).artifact
        tokenizer, model = AutoTokenizer.from_pretrained(place), AutoModelForCausalLM.from_pretrained(place)
        (token,) = tokenizer.encode("<item-1>", add_special_tokens=False)
        assert token < model.config.vocab_size == len(model.get_input_embeddings().weight)
    base = load_model(ModelFrom(path="x"), done.stage("base").artifact, None, seed=0)
    plain = AutoTokenizer.from_pretrained(done.stage("base").artifact)
    pieces = plain.encode("<item-1>", add_special_tokens=False)
    begun = base.causal.get_input_embeddings().weight[pieces].mean(0)
    assert not torch.allclose(model.get_input_embeddings().weight[token], begun, atol=1e-4)
    manifest["stages"]["next"]["add_tokens"] = ["<item-1>"]
    path.write_text(json.dumps(manifest))
    assert "'<item-1>' is in the vocabulary already" in str(validate(str(path), []).error)
