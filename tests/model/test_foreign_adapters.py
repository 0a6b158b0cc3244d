"""Adapters that others made: what PEFT makes of them is what we make of them, or they are refused by name."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import meshes
from postlude.manifest.adapter import Adapter
from postlude.manifest.problem import ManifestError
from postlude.manifest.schema import ModelFrom
from postlude.model.adapters.known import KNOWN_KEYS, MERGED_KINDS, REFUSED_KINDS
from postlude.model.adapters.stored import digest_of
from postlude.model.attached import AdapterRequest
from postlude.model.export import write_merged
from postlude.model.load import load_causal, load_model
from postlude.model.places import ADAPTER_CONFIG_FILE, ADAPTER_FILE, LINEAGE_FILE

TOKENS = torch.randint(150, (2, 9), generator=torch.Generator().manual_seed(3))
SOME = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    meshes.write_checkpoints(folder, ("llama", "llama tied", "qwen2", "qwen2 tied", "qwen3_moe"))
    read_gpt2().save_pretrained(folder / "gpt2")
    return folder


def read_gpt2():
    """A model whose layers hold their weights transposed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=150, n_embd=32, n_layer=2, n_head=4, n_positions=64))


def read(place):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(place)


def logits_of(model):
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def make(base, folder, config, prepare=lambda causal: None, **keys):
    """An adapter as PEFT saves it, every trained number of it another than at first."""
    from peft import get_peft_model

    torch.manual_seed(0)
    causal = read(base)
    prepare(causal)
    model = get_peft_model(causal, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter += 0.05 * torch.randn(parameter.shape)
    model.save_pretrained(folder, **keys)
    return folder


def peft_logits(base, folder, prepare=lambda causal: None):
    from peft import PeftModel

    causal = read(base)
    prepare(causal)
    return logits_of(PeftModel.from_pretrained(causal, folder))


def ours(place):
    """Merged in memory, and merged into files."""
    yield load_causal(ModelFrom(path=str(place)), str(place), None, seed=0)
    out = place.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    write_merged(str(place), out)
    yield read(out)


def assert_same(place, expected):
    for merged in ours(place):
        torch.testing.assert_close(logits_of(merged), expected, rtol=1e-4, atol=1e-4)


def lora(**keys):
    from peft import LoraConfig

    return LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": SOME, "task_type": "CAUSAL_LM", **keys})


# --- LoRA, by the keys of its configuration -----------------------------------------------------------------------

LORA = {
    "plain": {},
    "everywhere": {"target_modules": "all-linear"},
    "expression": {"target_modules": r".*\.0\..*q_proj"},
    "some_layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "exclude": {"exclude_modules": ["v_proj"]},
    "ranks": {"rank_pattern": {"q_proj": 3, r"layers\.1\.self_attn\.v_proj": 1}},
    "alphas": {"alpha_pattern": {"q_proj": 9}, "rank_pattern": {"v_proj": 4}, "use_rslora": True},
    "dora": {"use_dora": True, "rank_pattern": {"q_proj": 3}},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "mica": {"init_lora_weights": "mica"},
    "bias_all": {"bias": "all"},
    "head_saved": {"modules_to_save": ["lm_head"]},
    "embedding_saved": {"modules_to_save": ["embed_tokens"]},
    "both_saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "norm_saved": {"modules_to_save": ["norm"]},
    "tied_saved": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "on_embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "on_head": {"target_modules": ["q_proj", "lm_head"]},
    "on_both": {"target_modules": ["embed_tokens", "lm_head"]},
    "tied_on_both": {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "rows": {"trainable_token_indices": [3, 7, 20]},
    "parameters": {"target_modules": [], "target_parameters": ["q_proj.weight"]},
}


@pytest.mark.capability("Adapters that others made: as PEFT has them, or refused by name")
@pytest.mark.parametrize("base", ["llama", "llama tied"])
@pytest.mark.parametrize("name", LORA)
def test_a_lora_is_what_peft_makes_of_it(bases, tmp_path, base, name) -> None:
    folder = make(bases / base, tmp_path / "adapter", lora(**LORA[name]))
    assert_same(folder, peft_logits(bases / base, folder))


ELSEWHERE = {
    "gpt2": {"target_modules": ["c_attn", "c_proj"]},
    "gpt2 transposed": {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "init_lora_weights": "pissa"},
    "qwen2 biases": {"target_modules": ["q_proj", "v_proj"], "lora_bias": True},
    "qwen2 biases_of_layers": {"bias": "lora_only"},
    "qwen3_moe": {"target_modules": "all-linear"},
    "qwen3_moe experts": {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_lora_of_other_layers_is_what_peft_makes_of_it(bases, tmp_path, name) -> None:
    base = bases / name.split()[0]
    folder = make(base, tmp_path / "adapter", lora(**ELSEWHERE[name]))
    assert_same(folder, peft_logits(base, folder))


def test_a_bias_for_which_there_is_no_place_is_refused(bases, tmp_path) -> None:
    folder = make(bases / "llama", tmp_path / "adapter", lora(lora_bias=True))
    with pytest.raises(ManifestError, match=r"cannot merge it.*bias"):
        load_causal(ModelFrom(path=str(folder)), str(folder), None, seed=0)


def test_embeddings_that_peft_saves_beside_are_those_of_the_model(bases, tmp_path) -> None:
    for base in ("llama", "llama tied"):

        def stir(causal) -> None:
            with torch.no_grad():
                causal.get_input_embeddings().weight += 0.1

        for name in ("plain", "on_embedding"):
            place = tmp_path / f"{base} {name}" / "adapter"
            make(bases / base, place, lora(**LORA[name]), stir, save_embedding_layers=True)
            assert_same(place, peft_logits(bases / base, place))


@pytest.mark.parametrize("base", ["llama", "llama tied"])
def test_a_larger_vocabulary_comes_with_its_rows(bases, tmp_path, base) -> None:
    def grow(causal) -> None:
        torch.manual_seed(5)
        causal.resize_token_embeddings(170, mean_resizing=False)

    place = tmp_path / "plain" / "adapter"
    make(bases / base, place, lora(), grow)
    assert_same(place, peft_logits(bases / base, place, grow))
    place = tmp_path / "on embedding" / "adapter"
    make(bases / base, place, lora(**LORA["on_embedding"]), grow)
    if base == "llama tied":
        assert_same(place, peft_logits(bases / base, place, grow))
    else:  # PEFT then saves the rows of the embedding and not those of the head
        with pytest.raises(ManifestError, match=r"170 rows for 'model\.embed_tokens', where its base has 150"):
            load_causal(ModelFrom(path=str(place)), str(place), None, seed=0)


def test_an_adapter_on_a_changed_vocabulary_is_divided_like_any_model(bases, tmp_path) -> None:
    folder = make(bases / "llama tied", tmp_path / "adapter", lora(modules_to_save=["lm_head"]))
    asked = AdapterRequest(Adapter(rank=2), 1, lambda dtype: torch.float32)
    model = load_model(ModelFrom(path=str(folder)), str(folder), None, seed=0, adapter=asked)
    assert not model.config.tie_word_embeddings
    with model.plain() as causal:
        found = logits_of(causal)[..., :150]
    torch.testing.assert_close(found, peft_logits(bases / "llama tied", folder)[..., :150], rtol=1e-4, atol=1e-4)


REFUSED = {
    "pissa_niter_4": ("init_lora_weights", "pissa_niter_4"),
    "corda": ("init_lora_weights", "corda"),
    "lora_ga": ("init_lora_weights", "lora_ga"),
    "unheard": ("init_lora_weights", "unheard"),
    "alora": ("alora_invocation_tokens", [1, 2]),
    "layers": ("layer_replication", [[0, 2], [0, 2]]),
    "qalora": ("use_qalora", True),
    "megatron": ("megatron_config", {"a": 1}),
    "next year's": ("lora_next", 7),
    "revision": ("revision", "abc"),
    "soft prompts": ("peft_type", "PROMPT_TUNING"),
    "next year's kind": ("peft_type", "NEXT"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_by_key_and_value(bases, tmp_path, name) -> None:
    folder = make(bases / "llama", tmp_path / "adapter", lora())
    key, value = REFUSED[name]
    change(folder, **{key: value})
    with pytest.raises(ManifestError, match=f"{key}: ") as refusal:
        load_causal(ModelFrom(path=str(folder)), str(folder), None, seed=0)
    assert repr(value) in str(refusal.value)


def change(folder, **keys) -> None:
    file = folder / ADAPTER_CONFIG_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


def test_every_key_of_pefts_lora_is_known() -> None:
    from peft import LoraConfig

    assert {field.name for field in dataclasses.fields(LoraConfig)} == set(KNOWN_KEYS)


def test_every_kind_of_peft_is_known() -> None:
    from peft import PeftType

    assert {kind.value for kind in PeftType} == {"LORA"} | MERGED_KINDS | REFUSED_KINDS.keys()
    assert not MERGED_KINDS & REFUSED_KINDS.keys()


# --- other kinds --------------------------------------------------------------------------------------------------

KEYS = {
    "ADALORA": {"init_r": 4, "target_r": 2, "total_step": 10},
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "TRAINABLE_TOKENS": {"token_indices": [3, 7, 20], "target_modules": ["embed_tokens"]},
    "OFT": {"oft_block_size": 4, "r": 0},
    "BOFT": {"boft_block_size": 4},
    "FOURIERFT": {"n_frequency": 10},
    "WAVEFT": {"n_frequency": 10},
    "VBLORA": {"num_vectors": 20, "vector_length": 4},
    "VERA": {"r": 4},
    "C3A": {"block_size": 4},
    "MISS": {"r": 4},
    "PSOFT": {"r": 4},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 2},
}


@pytest.mark.long
@pytest.mark.parametrize("base", ["qwen2", "qwen2 tied"])
@pytest.mark.parametrize("kind", sorted(MERGED_KINDS))
def test_another_kind_is_what_peft_makes_of_it_or_is_refused(bases, tmp_path, kind, base) -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if kind == "ADAMSS":
        pytest.importorskip("sklearn")
    keys = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **KEYS.get(kind, {})}
    folder = make(bases / base, tmp_path / "adapter", PEFT_TYPE_TO_CONFIG_MAPPING[kind](**keys))
    assert_same(folder, peft_logits(bases / base, folder))


# --- files --------------------------------------------------------------------------------------------------------


def test_a_tensor_without_a_place_or_a_missing_one_is_named(bases, tmp_path) -> None:
    for name in ("plain", "head_saved"):
        folder = make(bases / "llama", tmp_path / name, lora(**LORA[name]))
        tensors = load_file(folder / ADAPTER_FILE)
        path = "base_model.model.model.layers.0.self_attn"
        save_file({**tensors, f"{path}.k_proj.lora_A.weight": torch.ones(2, 32)}, folder / ADAPTER_FILE)
        with pytest.raises(ManifestError, match=r"k_proj\.lora_A"):
            load_causal(ModelFrom(path=str(folder)), str(folder), None, seed=0)
        del tensors[f"{path}.q_proj.lora_B.weight"]
        save_file(tensors, folder / ADAPTER_FILE)
        with pytest.raises(ManifestError, match=r"q_proj\.lora_B"):
            load_causal(ModelFrom(path=str(folder)), str(folder), None, seed=0)


def test_a_folder_with_both_configurations_is_an_adapter(bases, tmp_path) -> None:
    folder = make(bases / "llama", tmp_path / "adapter", lora())
    expected = peft_logits(bases / "llama", folder)
    shutil.copy(bases / "llama" / "config.json", folder)
    assert_same(folder, expected)
    shutil.copytree(bases / "llama", folder, dirs_exist_ok=True)
    change(folder, base_model_name_or_path=str(folder))
    assert_same(folder, expected)


def test_pickled_weights_are_read_too(bases, tmp_path) -> None:
    folder = make(bases / "llama", tmp_path / "adapter", lora(), safe_serialization=False)
    assert not (folder / ADAPTER_FILE).exists()
    assert_same(folder, peft_logits(bases / "llama", folder))
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(ManifestError, match=f"no {ADAPTER_FILE}"):
        load_causal(ModelFrom(path=str(folder)), str(folder), None, seed=0)


def test_a_relative_base_is_found_beside_the_adapter(bases, tmp_path, monkeypatch) -> None:
    folder = make(bases / "llama", tmp_path / "adapter", lora())
    expected = peft_logits(bases / "llama", folder)
    shutil.copytree(bases / "llama", tmp_path / "base")
    change(folder, base_model_name_or_path="../base")
    monkeypatch.chdir(bases)
    assert_same(folder, expected)
    change(folder, base_model_name_or_path="../nowhere")
    with pytest.raises(ManifestError, match=r"base of the adapter .*nowhere"):
        load_causal(ModelFrom(path=str(folder)), str(folder), None, seed=0)


def test_an_artifact_whose_base_is_relative_is_used_from_any_folder(bases, tmp_path, monkeypatch) -> None:
    """As earlier versions wrote them: relative to where the run was started."""
    folder = make(bases / "llama", tmp_path / "runs" / "one" / "adapter", lora())
    expected = peft_logits(bases / "llama", folder)
    shutil.copytree(bases / "llama", tmp_path / "base")
    entry = {"place": "base", "sha256": digest_of(str(tmp_path / "base"))}
    (folder / LINEAGE_FILE).write_text(json.dumps({"base": entry}))
    (tmp_path / "elsewhere" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert_same(folder, expected)


@pytest.mark.parametrize("name", ["pissa", "head_saved", "rows"])
def test_only_a_plain_adapter_is_trained_on(bases, tmp_path, name) -> None:
    folder = make(bases / "llama", tmp_path / "adapter", lora(**LORA[name]))
    asked = AdapterRequest(Adapter.model_validate({"continue": True}), 1, lambda dtype: torch.float32)
    with pytest.raises(ManifestError, match="cannot be trained on"):
        load_model(ModelFrom(path=str(folder)), str(folder), None, seed=0, adapter=asked)
