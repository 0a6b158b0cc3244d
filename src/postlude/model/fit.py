"""Whether the files of a model hold its weights and nothing else, and whether its head is its own."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from postlude.manifest.problem import ManifestError
from postlude.model.places import SCALAR_FILE
from postlude.model.weights import Sources

Tensors = TypeVar("Tensors")

ROWS = 4096
"""Of an embedding that are compared at a time."""
_COMPUTED = re.compile(r"(rotary_emb\.inv_freq|(^|\.)position_ids)$")
"""Buffers that older files hold, and that follow from the configuration."""
_OLD_MASKS = r"\.(attn|attention|self_attn)\.(masked_)?bias$"
"""Causal masks that older files of GPT-2 and its kin hold as if they were weights."""


def check_complete(missing: Iterable[str], place: str, architecture: str) -> None:
    """ManifestError for a model whose files lack weights."""
    if names := sorted(missing):
        raise ManifestError(
            f"The model at '{place}' is incomplete: {len(names)} weights of the architecture '{architecture}' are not "
            f"in its files, the first being '{names[0]}'. Give a complete causal language model."
        )


def check_nothing_else(names: Iterable[str], causal: PreTrainedModel, place: str, folder: str) -> None:
    """ManifestError for tensors, by these names, that files hold and the architecture has no place for. Those that it
    declares needless are warned of.

    Files with a head ``scalar`` beside them may hold it a second time, as transformers' sequence classification.
    """
    needless = "|".join(f"({pattern})" for pattern in (*(causal._keys_to_ignore_on_load_unexpected or ()), _OLD_MASKS))
    surplus = sorted(name for name in names if not _COMPUTED.search(name))
    ignored = [name for name in surplus if re.search(needless, name)]
    unknown = [name for name in surplus if name not in ignored]
    if len(unknown) == 1 and unknown[0].endswith(".weight") and Path(folder, SCALAR_FILE).exists():
        return
    architecture = causal.config.model_type
    if unknown:
        raise ManifestError(
            f"The files of the model at '{place}' hold {len(unknown)} tensors that its configuration has no place for, "
            f"so that it would be another model without them: {_listed(unknown)}. Correct config.json (the "
            f"architecture is '{architecture}'), or take them out of the files if they belong to nothing."
        )
    if ignored:
        warnings.warn(
            f"Of the model at '{place}' {len(ignored)} tensors are neither read nor written, which the architecture "
            f"'{architecture}' does not need: {_listed(ignored)}.",
            stacklevel=2,
        )


def _listed(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def head_and_embedding(causal: PreTrainedModel) -> tuple[str, str] | None:
    """The names of the weights of a model's head and of its embedding; None if it lacks one of them."""
    named = {id(module): name for name, module in causal.named_modules()}
    modules = (causal.get_output_embeddings(), causal.get_input_embeddings())
    if None in modules:
        return None
    head, embedding = (f"{named[id(module)]}.weight" for module in modules)
    return head, embedding


def is_tied(config: PreTrainedConfig) -> bool:
    """Whether a configuration says that the head is the embedding."""
    return bool(config.tie_word_embeddings or config.get_text_config().tie_word_embeddings)


def untie(config: PreTrainedConfig) -> None:
    """Say in a configuration that the head has weights of its own."""
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False


def with_tied(sources: Mapping[str, Tensors], causal: PreTrainedModel) -> dict[str, Tensors]:
    """The weights of a model with each that is one with another, as its configuration says, under both names."""
    whole = dict(sources)
    for pair in (getattr(causal, "all_tied_weights_keys", None) or {}).items():
        there = next((whole[name] for name in pair if name in whole), None)
        if there is not None:
            whole = dict.fromkeys(pair, there) | whole
    return whole


def has_own_head(sources: Sources, causal: PreTrainedModel) -> bool:
    """Whether the files of a model hold a head that differs from the embedding."""
    names = head_and_embedding(causal)
    if names is None or not all(name in sources for name in names):
        return False
    head, embedding = (sources[name] for name in names)
    if head.shape != embedding.shape:
        return True
    for start in range(0, head.shape[0], ROWS):
        region = (slice(start, min(start + ROWS, head.shape[0])), *(slice(0, size) for size in head.shape[1:]))
        if not torch.equal(head.read(region), embedding.read(region)):
            return True
    return False
