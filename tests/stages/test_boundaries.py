"""Where prompts end: what is told of those that are asked with other tokens than they are trained with."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from postlude.data.dataset import Dataset
from postlude.data.document import Unit
from postlude.data.encode import Encoder
from postlude.data.encoded_dataset import EncodedDataset
from postlude.manifest.schema import DatasetConfig
from postlude.rollout.prompts import NotAsked, Prompt, PromptEncoder, PromptEncoders
from postlude.stages import boundaries
from postlude.stages.boundaries import remark_on_asked, remark_on_boundaries

PROMPTS = ["Is it good? Answer: ", "Is it good? Answer:", "Once\n"]
COMPLETION = "yes it is"


@pytest.fixture(scope="module")
def tokenizer(shared_data: Any) -> Any:
    return AutoTokenizer.from_pretrained(shared_data / "models" / "stories260K_hf")


def differing(tokenizer: Any) -> list[str]:
    """The prompts whose tokens are not those that they have before the completion."""
    pairs = [(prompt, tokenizer(prompt).input_ids, tokenizer(prompt + COMPLETION).input_ids) for prompt in PROMPTS]
    return [prompt for prompt, alone, together in pairs if together[: len(alone)] != alone]


def encoded(tokenizer: Any, folder: Any, apart: bool) -> EncodedDataset:
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "completion": COMPLETION}) + "\n" for p in PROMPTS))
    config = DatasetConfig.model_validate({"source": {"path": str(path)}, "format": "prompt_completion"})
    encoder = Encoder(tokenizer, block=64, apart=apart)
    return EncodedDataset(
        Dataset("a", config, str(folder / "cache")), encoder, lambda documents: (Unit((*documents,)),)
    )


@pytest.mark.capability("The share of prompts that are asked with other tokens than trained is told, and one is shown")
def test_the_share_of_prompts_that_differ_is_told_and_one_is_shown(tokenizer, tmp_path) -> None:
    assert differing(tokenizer) == PROMPTS[:1]
    [remark] = remark_on_boundaries(encoded(tokenizer, tmp_path, False), PromptEncoder(tokenizer), False)
    assert remark.startswith("1 of 3 prompts of 'a'")
    asked, trained = (tokenizer.tokenize(text) for text in (PROMPTS[0], PROMPTS[0] + COMPLETION))
    same = next(i for i, (one, other) in enumerate(zip(asked, trained, strict=False)) if one != other)
    assert str(trained[same - 1 : same + 3]) in remark
    assert str(asked[same - 1 : same + 3]) in remark
    assert "data.a.tokenize: apart" in remark
    assert remark_on_boundaries(encoded(tokenizer, tmp_path, True), PromptEncoder(tokenizer), True) == []


def test_prompts_that_are_only_asked_are_told_of_too(tokenizer, monkeypatch) -> None:
    config = SimpleNamespace(template=None, tokenize=None)
    parts: Any = SimpleNamespace(manifest=SimpleNamespace(data={"a": config}), today=None)
    encoders = PromptEncoders(tokenizer, {"a": None})
    answered = [Prompt(f"a:{n}", "a", text, None, COMPLETION, {}) for n, text in enumerate(PROMPTS)]
    open_ended = [Prompt(f"a:o{n}", "a", text, None, None, {}) for n, text in enumerate(PROMPTS)]
    [remark] = remark_on_asked(parts, [NotAsked("a:x", "a", "no"), *answered], encoders)
    assert remark.startswith("1 of 3 prompts of 'a'")
    assert "'a:0' goes on with" in remark
    monkeypatch.setattr(boundaries, "_PROBE", COMPLETION)
    [remark] = remark_on_asked(parts, open_ended, encoders)  # of these an answer is made up where a space ends them
    assert remark.startswith("1 of 2 prompts of 'a'")
    assert remark_on_asked(parts, answered[1:], encoders) == []
