"""Models that a stage runs forward: those that answer prompts, and those that score answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from postlude import storage
from postlude.data.dataset import Dataset
from postlude.data.example import Conversation, Example, Judged, Ranked, Record, Text
from postlude.errors import UserError
from postlude.manifest.schema import ModelFrom, ModelPlace
from postlude.model import vocabulary
from postlude.model.causal import with_weights_in
from postlude.model.load import configuration, count_parameters, load_causal, load_model
from postlude.model.places import SCALAR_FILE
from postlude.rollout.native import NativeEngine
from postlude.rollout.prompts import PromptEncoder
from postlude.rollout.reward import Reward
from postlude.rollout.reward_model import Judge
from postlude.stages.little import LARGEST_PARAMETERS, little_model
from postlude.stages.parts import Parts
from postlude.training.precision import DTYPES

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from postlude.model.language_model import LanguageModel

JUDGED_TOKENS = 8192
"""Tokens that go through a reward model, or one whose likelihoods are measured, at a time."""

ASKING = (Conversation, Text, Ranked, Judged)
"""The shapes of examples that have a prompt."""


class TooLarge(UserError):
    """A model is too large to be tried on this machine, even made small."""


class ForwardModels(Parts):
    """Parts with models that are not trained. Where it ``rehearses``, small random models stand in for the stage's."""

    rehearses = False

    def records(
        self, datasets: Mapping[str, Dataset], rows: Iterable[tuple[str, int, int]]
    ) -> Iterator[tuple[str, Record, list[tuple[str, Example]]]]:
        """The record and the examples of each row, which comes as data set, group and position; both are empty for a
        bad record that is skipped."""
        for (name, group), some in groupby(rows, key=lambda row: row[:2]):
            for record, examples in datasets[name].read(group, [position for *_, position in some]):
                yield name, record, examples

    @cached_property
    def seed(self) -> int:
        return self.manifest.seed

    def prompt_encoder(self, start: ModelPlace, dataset: str) -> PromptEncoder:
        """How the prompts of a data set are put to a model."""
        return PromptEncoder(self.tokenizer_of(start), self.manifest.data[dataset].template, self.begun)

    def engine(self, start: ModelPlace, batch: int) -> NativeEngine:
        """An engine over a model. :class:`TooLarge` in a rehearsal."""
        tokenizer = self.tokenizer_of(start)
        small = self._stand_in(start, tokenizer)
        if small is not None:
            causal = load_causal(small, None, tokenizer, seed=self.seed)
        else:
            causal = load_causal(start, self.place_of(start), tokenizer, seed=self.seed)
            causal = with_weights_in(causal, self._dtype(causal.dtype))
        causal.to(self.workers.device)  # type: ignore[arg-type]
        return NativeEngine(causal, vocabulary.rows(causal), batch)

    def language_model(self, start: ModelPlace) -> tuple[LanguageModel, PreTrainedTokenizerBase]:
        """A model over packed batches, not trained, with its tokenizer. :class:`TooLarge` in a rehearsal."""
        tokenizer = self.tokenizer_of(start)
        small = self._stand_in(start, tokenizer)
        if small is not None:
            model = load_model(small, None, tokenizer, seed=self.seed)
        else:
            model = load_model(start, self.place_of(start), tokenizer, seed=self.seed)
            with_weights_in(model, self._dtype(model.stored_dtype or torch.float32))
        model.to(self.workers.device)
        model.eval().requires_grad_(False)
        return model, tokenizer

    def judge(self, reward: Reward) -> Judge:
        """The reward model of a part of the reward."""
        start = reward.model
        assert start is not None
        model, tokenizer = self.language_model(start)
        place = self.place_of(start) or ""
        is_told = not self.is_there(start) or not storage.exists(place)  # a stage's, or a name on the hub
        if self.rehearses and (is_told or storage.exists(storage.join(place, SCALAR_FILE))):
            model.add_scalar_head()
        return Judge(model, tokenizer, start.from_ or start.path or "", JUDGED_TOKENS)

    def lineage(self, start: ModelPlace) -> dict[str, Any]:
        """A model as the lineage tells it."""
        return start.model_dump(mode="json", by_alias=True, exclude_none=True)

    def _dtype(self, stored: torch.dtype) -> torch.dtype:
        asked = self.stage_config.precision  # type: ignore[attr-defined]
        if asked != "auto":
            return DTYPES[asked]
        return torch.float32 if self.workers.device.type == "cpu" else stored

    def _stand_in(self, start: ModelPlace, tokenizer: PreTrainedTokenizerBase) -> ModelFrom | None:
        """The small random model that stands in for another in a rehearsal; None outside of one."""
        if not self.rehearses:
            return None
        root = self.root(start)
        small = little_model(configuration(root, self.place_of(root), tokenizer))
        if count_parameters(configuration(small, None, tokenizer)) > LARGEST_PARAMETERS:
            raise TooLarge(f"The model '{start.from_ or start.path}' is too large for this machine.")
        return small


def stop_ids_of(causal: PreTrainedModel, encoder: PromptEncoder) -> frozenset[int]:
    """The tokens with which a model ends an answer: what its template and its generation config say."""
    configured: Any = causal.generation_config.eos_token_id
    own = configured if isinstance(configured, list) else [configured]
    return frozenset([*encoder.stop_ids(), *(token for token in own if token is not None)])
