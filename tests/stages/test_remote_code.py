"""A model that brings code of its own: that is not run unless the manifest says so, and then as it was read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from postlude.data import remote_code
from postlude.data.remote_code import code_digest, is_trusted, trust
from postlude.data.tokenizer import load_tokenizer
from postlude.manifest.problem import ManifestError
from postlude.manifest.schema import TokenizerFrom
from postlude.model.places import read_config

CODE = """
from transformers import LlamaConfig

open({mark!r}, "a").write("run")


class OwnConfig(LlamaConfig):
    model_type = "own_llama"
"""


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(remote_code, "_trusted", set())
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "model"
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=320, **size)).save_pretrained(folder)
    load_tokenizer(TokenizerFrom(bytes=True)).save_pretrained(folder)
    (folder / "own.py").write_text(CODE.format(mark=str(tmp_path / "was-run")))
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own_llama", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.capability("Code that a model brings is not run unless the manifest says so, and its digest is kept")
def test_code_of_a_model_is_run_only_where_it_is_trusted(model, tmp_path):
    with pytest.raises(ManifestError, match="trust_remote_code: true"):
        read_config(str(model), str(model))
    assert not (tmp_path / "was-run").exists()
    trust(str(model))
    assert read_config(str(model), str(model)).model_type == "own_llama"
    assert (tmp_path / "was-run").exists()


def test_trust_is_of_a_folder_and_what_lies_below_it(model):
    assert not is_trusted(str(model))
    assert not is_trusted(None)
    trust(str(model))
    assert is_trusted(str(model))
    assert is_trusted(f"{model}/below")
    assert not is_trusted(f"{model}-other")
    assert not is_trusted("someone/model")


def test_a_digest_changes_with_the_code_and_code_elsewhere_is_refused(model):
    before = code_digest(str(model))
    (model / "below").mkdir()
    (model / "below" / "more.py").write_text("more = 1\n")
    assert code_digest(str(model)) != before
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "other/model--own.OwnConfig"}}))
    with pytest.raises(ManifestError, match="names code of another model"):
        code_digest(str(model))
    with pytest.raises(ManifestError, match="no folder of this machine"):
        code_digest("s3://bucket/model")
