"""All causal language models of the installed transformers: each is proven on packs or refused by its name."""

from __future__ import annotations

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from postlude.model.anatomy import UnsupportedModel
from postlude.model.language_model import LanguageModel
from postlude.model.verify import verify

UNFIT = (
    StrictDataclassError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    RuntimeError,
    AssertionError,
    ImportError,
)
"""What transformers raises where one small shape does not suit an architecture's other numbers."""

LARGEST = 30_000_000
"""What stays larger although its shape was asked to be small (parts for images or sound) is left out."""


@pytest.mark.long
@pytest.mark.capability("Packed training of any causal transformer")
def test_every_architecture_is_proven_or_refused(tiny_causal):
    outcomes: dict[str, list[str]] = {"proven": [], "refused": [], "refused without its name": [], "not tried": []}
    for architecture in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        try:
            with torch.device("meta"):
                size = sum(p.numel() for p in tiny_causal(architecture).parameters())
            causal = tiny_causal(architecture) if size < LARGEST else None
            if causal is not None:  # some need numbers of their own to run at all
                causal(input_ids=torch.arange(6)[None], use_cache=False)
        except UNFIT:
            causal = None
        if causal is None:
            outcomes["not tried"].append(architecture)
            continue
        try:
            model = LanguageModel(causal)
        except UnsupportedModel as refusal:
            named = f"'{architecture}'" in str(refusal)
            outcomes["refused" if named else "refused without its name"].append(architecture)
            continue
        report = verify(model, [range(9), range(30), range(2)])
        assert report.same, f"{architecture} was accepted, but differs: {report.to_json()}"
        outcomes["proven"].append(architecture)
    for outcome, names in outcomes.items():
        print(f"{len(names)} {outcome}: {', '.join(names)}")
    assert not outcomes["refused without its name"]
    assert len(outcomes["proven"]) >= 70
    assert len(outcomes["refused"]) >= 40
