"""Models that a stage runs forward: those that answer prompts, and those that score answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from postlude import storage
from postlude.errors import UserError
from postlude.manifest.schema import ModelFrom, ModelPlace, NewModel
from postlude.model import vocabulary
from postlude.model.causal import with_weights_in
from postlude.model.language_model import LanguageModel
from postlude.model.load import configuration, count_parameters, load_causal, load_model
from postlude.model.places import SCALAR_FILE, configuration_keys
from postlude.rollout.native import NativeEngine
from postlude.rollout.reward import Reward
from postlude.rollout.scoring import RewardModel
from postlude.stages.parts import Parts
from postlude.training.precision import DTYPES

REWARD_TOKENS = 8192
"""Tokens that go through a reward model at a time."""
LARGEST_PARAMETERS = 300_000_000
"""A small model that is still larger than this is not run in a preflight: wide, or with a large vocabulary."""


class TooLarge(UserError):
    """A model is too large to be tried on this machine, even made small."""


class Models:
    """The models of a stage that it does not train. In a rehearsal small random ones stand in for them, or
    :class:`TooLarge` is raised."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts

    def engine(self, start: ModelPlace, batch: int) -> NativeEngine:
        """An engine over a model."""
        tokenizer = self.parts.tokenizer_of(start)
        source = self._source(start, tokenizer)
        causal = load_causal(source, self.parts.place_of(source), tokenizer, seed=self.parts.manifest.seed)
        if source is start:
            causal = with_weights_in(causal, self._dtype(causal.dtype))
        causal.to(self.parts.workers.device)  # type: ignore[arg-type]
        return NativeEngine(causal, vocabulary.rows(causal), batch)

    def language_model(self, start: ModelPlace) -> tuple[LanguageModel, PreTrainedTokenizerBase]:
        """A model over packed batches, not trained, with its tokenizer."""
        tokenizer = self.parts.tokenizer_of(start)
        source = self._source(start, tokenizer)
        model = load_model(source, self.parts.place_of(source), tokenizer, seed=self.parts.manifest.seed)
        if source is start:
            with_weights_in(model, self._dtype(model.stored_dtype or torch.float32))
        model.to(self.parts.workers.device)
        model.eval().requires_grad_(False)
        return model, tokenizer

    def reward_model(self, reward: Reward) -> RewardModel:
        """The model of a part of the reward."""
        start = reward.model
        assert start is not None
        model, tokenizer = self.language_model(start)
        if self.parts.mode.small and self._has_scalar_head(start):
            model.add_scalar_head()
        return RewardModel(model, tokenizer, start.from_ or start.path or "", REWARD_TOKENS)

    def _has_scalar_head(self, start: ModelPlace) -> bool:
        """Whether a model scores; that of a stage, or of a hub, is believed to."""
        place = self.parts.place_of(start) or ""
        is_believed = not self.parts.is_there(start) or not storage.exists(place)
        return is_believed or storage.exists(storage.join(place, SCALAR_FILE))

    def _dtype(self, stored: torch.dtype) -> torch.dtype:
        choice = self.parts.config.precision  # type: ignore[attr-defined]
        if choice != "auto":
            return DTYPES[choice]
        return torch.float32 if self.parts.workers.device.type == "cpu" else stored

    def _source(self, start: ModelPlace, tokenizer: PreTrainedTokenizerBase) -> ModelPlace:
        """What a model is loaded from: in a rehearsal a small random one."""
        if not self.parts.mode.small:
            return start
        root = self.parts.root(start)
        small = stand_in_for(configuration(root, self.parts.place_of(root), tokenizer))
        if count_parameters(configuration(small, None, tokenizer)) > LARGEST_PARAMETERS:
            raise TooLarge(f"The model '{start.from_ or start.path}' is too large for this machine.")
        return small


def lineage_of(start: ModelPlace) -> dict[str, Any]:
    """A model as the lineage tells it."""
    return start.model_dump(mode="json", by_alias=True, exclude_none=True)


def lineage_of_judges(rewards: Sequence[Reward]) -> dict[str, Any]:
    """The models of rewards as the lineage tells them, if there are any."""
    judges = [lineage_of(reward.model) for reward in rewards if reward.model is not None]
    return {"rewards": judges} if judges else {}


def stand_in_for(config: PreTrainedConfig) -> ModelFrom:
    """A new model of the same architecture, width and vocabulary with at most two layers and random weights."""
    architecture = config.model_type
    # Some configurations write down what they do not read: a pattern that others follow from, another name for a key.
    known = configuration_keys(architecture)
    other_names = {stored: key for key, stored in config.attribute_map.items()}
    named = {key if key in known else other_names.get(key, key): v for key, v in config.to_diff_dict().items()}
    layers = min(2, config.num_hidden_layers)
    small = {key: value for key, value in named.items() if key in known} | {"num_hidden_layers": layers}
    if getattr(config, "layer_types", None):
        small["layer_types"] = config.layer_types[:layers]
    return ModelFrom(new=NewModel(architecture=architecture, config=small))
