"""Adapters against PEFT, and their artifacts: what they hold, which base they belong to, and what becomes of them."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import meshes
from postlude.data.tokenizer import load_tokenizer
from postlude.manifest.adapter import Adapter
from postlude.manifest.problem import ManifestError
from postlude.manifest.schema import ModelFrom, TokenizerFrom
from postlude.model.attached import AdapterRequest
from postlude.model.export import write_merged, write_model
from postlude.model.load import load_causal, load_model
from postlude.training.workers import Workers

KINDS = {
    "lora": {"rank": 4},
    "rslora": {"rank": 4, "alpha": 3.0, "rslora": True, "targets": ["attention"]},
    "dora": {"rank": 2, "dora": True, "targets": ["q_proj", "mlp"]},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    meshes.write_checkpoints(folder, ("llama", "qwen3 tied", "qwen3_moe"))
    return folder


def adapted(place, stored=torch.float32, **keys):
    asked = AdapterRequest(Adapter.model_validate(keys), 1, lambda dtype: stored)
    model = load_model(ModelFrom(path=str(place)), str(place), None, seed=0, adapter=asked)
    model.make_trainable(True)
    return model


def stirred(model):
    """Every trained number another, so that nothing is compared while B is zero."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def logits_of(causal, tokens):
    with torch.no_grad():
        return causal(input_ids=tokens).logits


TOKENS = torch.randint(150, (2, 9), generator=torch.Generator().manual_seed(3))


def written(model, folder):
    write_model(model, load_tokenizer(TokenizerFrom(bytes=True)), folder, {"stage": "tune"})
    return folder


@pytest.mark.capability("Adapters: LoRA, rsLoRA, DoRA")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", ["llama", "qwen3 tied", "qwen3_moe"])
def test_loss_and_gradients_are_those_of_peft(bases, kind, base) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    keys = {**KINDS[kind], **({"targets": ["attention"]} if base == "qwen3_moe" else {})}
    model = stirred(adapted(bases / base, **keys))
    executor = meshes.executor_of(model, Workers(), None)
    from postlude.training.optimizers import SGD
    from postlude.training.precision import LossScale, Precision
    from postlude.training.program import Program, Role

    executor = replace(executor, program=Program(executor.program.objective, {"policy": Role(model, SGD())}))
    work = meshes.batches(0, 1)
    loss = executor.forward_backward(work, LossScale(Precision("fp32", "a test"))).loss

    config = LoraConfig(
        r=keys["rank"],
        lora_alpha=keys.get("alpha", 2 * keys["rank"]),
        target_modules=model.attached.config.target_modules,
        use_rslora=bool(keys.get("rslora")),
        use_dora=bool(keys.get("dora")),
        task_type="CAUSAL_LM",
    )
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(bases / base), config).train()
    own = {f"base_model.model.{n}": p for n, p in model.causal.named_parameters() if p.requires_grad}
    named = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    assert named.keys() == own.keys()
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(own[name])
    weight = sum(float(batch.weight.sum()) for batch in work)
    total = 0.0
    for batch in work:
        for tokens, weights in zip(
            batch.tokens.split(batch.lengths.tolist()), batch.weight.split(batch.lengths.tolist()), strict=True
        ):
            logits = theirs(input_ids=tokens[None]).logits[0, :-1].float()
            nll = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
            part = (nll * weights[1:]).sum() / weight
            part.backward()
            total += float(part.detach())
    assert loss == pytest.approx(total, rel=1e-6)
    for name, parameter in named.items():
        largest = float(parameter.grad.abs().max())
        assert float((own[name].grad - parameter.grad).abs().max()) <= 2e-5 * max(largest, 1e-3), name
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert frozen
    assert all(p.grad is None for p in frozen)


@pytest.mark.capability("An adapter's artifact: PEFT's format, or merged")
@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_the_artifact_and_merged_it_needs_no_peft(bases, tmp_path, kind) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = stirred(adapted(bases / "llama", **KINDS[kind]))
    with model.plain() as causal:
        causal.eval()
        expected = logits_of(causal, TOKENS)[..., :150]
    folder = written(model, tmp_path / "adapter")
    assert not list(folder.glob("model*"))
    base = AutoModelForCausalLM.from_pretrained(bases / "llama")
    theirs = PeftModel.from_pretrained(base, str(folder))
    torch.testing.assert_close(logits_of(theirs, TOKENS), expected, rtol=1e-5, atol=1e-5)
    (tmp_path / "merged").mkdir()
    write_merged(str(folder), tmp_path / "merged")
    merged, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits_of(merged, TOKENS), expected, rtol=1e-5, atol=1e-5)
    loaded = load_causal(ModelFrom(path=str(folder)), str(folder), None, seed=0)
    torch.testing.assert_close(logits_of(loaded, TOKENS), expected, rtol=1e-5, atol=1e-5)


def test_a_merged_weight_is_rounded_once(bases, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(bases / "llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    model = stirred(adapted(tmp_path / "base", torch.bfloat16, rank=4, targets=["q_proj"]))
    kept = {name: p.dtype for name, p in model.named_parameters()}
    assert {dtype for name, dtype in kept.items() if ".lora_" in name} == {torch.float32}
    assert {dtype for name, dtype in kept.items() if ".lora_" not in name} == {torch.bfloat16}
    folder = written(model, tmp_path / "adapter")
    (tmp_path / "merged").mkdir()
    write_merged(str(folder), tmp_path / "merged")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    layer = model.causal.model.layers[0].self_attn.q_proj
    expected = layer.base_layer.weight.float() + layer.get_delta_weight("default")
    assert torch.equal(found["model.layers.0.self_attn.q_proj.weight"], expected.to(torch.bfloat16))
    untouched = load_file(tmp_path / "base" / "model.safetensors")["model.layers.0.self_attn.k_proj.weight"]
    assert torch.equal(found["model.layers.0.self_attn.k_proj.weight"], untouched)


def test_a_dora_is_not_continued_on_a_packed_base(bases, tmp_path) -> None:
    folder = written(adapted(bases / "llama", **KINDS["dora"]), tmp_path / "adapter")
    with pytest.raises(ManifestError, match="is a DoRA"):
        adapted(folder, **{"continue": True, "base": "int8"})


def test_training_an_adapter_on_begins_with_it(bases, tmp_path) -> None:
    model = stirred(adapted(bases / "llama", **KINDS["rslora"]))
    folder = written(model, tmp_path / "adapter")
    again = adapted(folder, **{"continue": True})
    for (name, one), (other_name, other) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert name == other_name
        assert torch.equal(one, other)
    assert again.attached.base.place == str(bases / "llama")
    on_top = adapted(folder, rank=2)  # another: the first is merged, and is now its base
    assert on_top.attached.base.place == str(folder)


# --- what cannot be ---------------------------------------------------------------------------------------------


def test_a_base_that_is_not_the_one_is_refused(bases, tmp_path) -> None:
    shutil.copytree(bases / "llama", tmp_path / "base")
    folder = written(stirred(adapted(tmp_path / "base", rank=2)), tmp_path / "adapter")
    meshes.write_checkpoints(tmp_path / "other", ("llama tied",))
    shutil.copy(tmp_path / "other" / "llama tied" / "model.safetensors", tmp_path / "base" / "model.safetensors")
    with pytest.raises(ManifestError, match="only fits the weights that it was trained on"):
        load_causal(ModelFrom(path=str(folder)), str(folder), None, seed=0)
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(ManifestError, match="which is not there"):
        load_causal(ModelFrom(path=str(folder)), str(folder), None, seed=0)


def test_targets_that_are_not_there_are_named(bases) -> None:
    with pytest.raises(ManifestError, match=r"'qkv' is no linear layer .* down_proj, gate_proj, k_proj"):
        adapted(bases / "llama", targets=["qkv"])
    with pytest.raises(ManifestError, match="'mlp' is no linear layer"):
        adapted(bases / "qwen3_moe", targets=["mlp"])


def test_there_must_be_an_adapter_to_continue(bases) -> None:
    with pytest.raises(ManifestError, match="there is no adapter to train on"):
        adapted(bases / "llama", **{"continue": True})


@pytest.mark.parametrize("keys", [{"rank": 4, "continue": True}, {"rank": 0}, {"dropout": 1.0}, {"targets": []}])
def test_an_adapter_that_cannot_be_is_refused(keys) -> None:
    with pytest.raises(ValueError, match=r"continue|greater than 0|less than 1|at least 1"):
        Adapter.model_validate(keys)
