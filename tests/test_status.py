"""What docs/status.md calls absent is refused by the manifest, and everything that runs is loaded by its recipe."""

from __future__ import annotations

import json

import pytest

from postlude.manifest.load import load
from postlude.manifest.problem import ManifestError
from status import ABSENT

MANIFEST = {
    "name": "whole",
    "data": {"chats": {"source": {"path": "chats.jsonl"}, "format": "messages"}},
    "compute": {"pools": {"train": {"workers": 1}}},
    "stages": {
        "sft": {"recipe": "sft", "model": {"path": "somewhere"}, "data": {"chats": 1.0}, "steps": 1},
        "rl": {
            "recipe": "grpo",
            "model": {"from": "sft"},
            "data": {"chats": 1.0},
            "reward": [{"function": "exact_match"}],
            "steps": 1,
        },
    },
}


def test_the_manifest_itself_is_sound() -> None:
    load(json.dumps(MANIFEST), "whole.yaml")


@pytest.mark.parametrize("override", ABSENT.values())
def test_what_is_absent_is_refused(override: str) -> None:
    with pytest.raises(ManifestError):
        load(json.dumps(MANIFEST), "whole.yaml", [override])
