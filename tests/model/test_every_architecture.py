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


SHAPES = ({}, {"num_key_value_heads": 4})
"""Changes to the small shape to try in turn: some architectures do not share key heads."""


def _built(tiny_causal, architecture, changes):
    """A tiny model that runs, or None."""
    try:
        with torch.device("meta"):
            size = sum(p.numel() for p in tiny_causal(architecture, **changes).parameters())
        if size > LARGEST:
            return None
        causal = tiny_causal(architecture, **changes)
        causal(input_ids=torch.arange(6)[None], use_cache=False)
    except UNFIT:
        return None
    return causal


@pytest.mark.long
@pytest.mark.capability("Packed training of any causal transformer")
def test_every_architecture_is_proven_or_refused(tiny_causal):
    outcomes: dict[str, list[str]] = {"proven": [], "refused": [], "refused without its name": [], "not tried": []}
    for architecture in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        causal = next(filter(None, (_built(tiny_causal, architecture, changes) for changes in SHAPES)), None)
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
