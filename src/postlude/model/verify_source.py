"""Whether a model holds what its source says: what it must hold is read from there, and every difference is told.

- A stage's artifact: the last checkpoint, and for what was not trained the model that the stage began with.
- An exported folder: the artifact that it was made of; where an adapter was merged, that and its base.

Files are read tensor by tensor, a model's own and those of its source, and not as a model, which may leave out some.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Container, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import AutoModelForSequenceClassification, GenerationConfig, PreTrainedConfig
from transformers.utils import GENERATION_CONFIG_NAME

from postlude import storage
from postlude.data.tokenizer import load_tokenizer
from postlude.errors import UserError
from postlude.manifest.problem import ManifestError
from postlude.manifest.schema import ModelFrom
from postlude.model.adapters.merge import config_of, merged_sources
from postlude.model.adapters.stored import StoredAdapter, StoredModel, digest_of, open_model
from postlude.model.causal import from_config, weightless
from postlude.model.checkpoint_reader import Reader, load
from postlude.model.fit import has_own_head, is_tied, untie, with_tied
from postlude.model.load import configuration
from postlude.model.places import (
    ADAPTER_CONFIG_FILE,
    EXPORTED_FROM,
    LINEAGE_FILE,
    SCALAR_FILE,
    adapter_folder,
    is_adapter_part,
    local_files,
    local_folder,
    read_config,
)
from postlude.model.sharded import SCALAR, NotInParts, rename_as_in_model
from postlude.model.vocabulary import padded_size
from postlude.model.weights import InMemory, LazyTensor, open_checkpoint, read_scalar, read_whole
from postlude.runs import Run, Stage, artifact_of, find
from postlude.runs.lineage import place_of

POLICY = "policy.model."
"""Before the names of the policy's weights in a checkpoint."""
_FREE = {
    *("architectures", "dtype", "vocab_size", "tie_word_embeddings", "use_cache", "transformers_version"),
    *("id2label", "label2id", "num_labels", "eos_token_id", "_name_or_path", "_from_model_config"),
}
"""Keys of configurations that are compared otherwise, or that follow from what was trained."""
_CONFIGS = ("config.json", GENERATION_CONFIG_NAME, ADAPTER_CONFIG_FILE)
_FILLED = ("bos_token_id", "pad_token_id", "do_sample")
"""Keys that an artifact has a value for where its source has none."""


@dataclass
class Comparison:
    """What came of comparing a model with its source."""

    compared_with: list[str] = field(default_factory=list)
    not_compared: list[str] = field(default_factory=list)
    """What could not be, and why."""
    faults: dict[str, list[str]] = field(default_factory=dict)
    """What is not as it must be, by kind, each by its name."""
    has_lineage: bool = False

    def note(self, kind: str, names: Iterable[str]) -> None:
        """Add faults of a kind."""
        if listed := sorted(names):
            self.faults[kind] = [*self.faults.get(kind, ()), *listed]


@dataclass
class Content:
    """What a model holds, or must hold."""

    tensors: dict[str, LazyTensor | None] = field(default_factory=dict)
    """By their names in transformers' model; None where only that it is there is known."""
    config: PreTrainedConfig | None = None
    generation: GenerationConfig | None = None
    stops: set[int] | None = None
    """The tokens at which generation stops; None where that is not known."""

    def values(self) -> dict[str, LazyTensor]:
        """The tensors whose values are known."""
        return {name: tensor for name, tensor in self.tensors.items() if tensor is not None}


def compare_with_source(place: str) -> Comparison:
    """Compare the model at a place with the source that it claims, as far as that is there."""
    found = Comparison()
    with ExitStack() as opened:
        folder = opened.enter_context(local_files(place))
        lineage = _lineage(folder)
        if lineage is None:
            found.not_compared.append(f"no source can be found: no {LINEAGE_FILE} says what it was made of")
            return found
        found.has_lineage = True
        _compare_files(place, place, found)
        is_whole = adapter_folder(folder) is None
        required = Content()
        try:
            claim = (place, lineage, is_whole, found, opened)
            required = (_Exported(*claim) if EXPORTED_FROM in lineage else _Trained(*claim)).required()
        except (UserError, OSError) as error:
            found.not_compared.append(f"its source cannot be read: {error}")
        try:
            stored = StoredModel(folder, place) if is_whole else StoredModel("", "", (StoredAdapter(folder, place),))
            actual = _content(stored)
            actual.generation = _generation_config(folder)
            required.stops = _stops(lineage, place, required.generation)
            _compare(required, actual, found)
        except NotInParts as error:
            found.not_compared.append(str(error))
        except ManifestError as error:
            found.faults["unreadable"] = [str(error)]
    return found


def _lineage(folder: str) -> dict[str, Any] | None:
    """What the lineage in a folder says, if it is one of ours."""
    try:
        lineage = json.loads(Path(folder, LINEAGE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return lineage if isinstance(lineage, dict) and {"run", "stage"} <= lineage.keys() else None


def _content(stored: StoredModel) -> Content:
    """What a whole model holds, with the adapters on it merged; of an adapter without its base its own tensors."""
    content = Content()
    if stored.whole_folder:
        content.config = config_of(stored)
        causal = weightless(stored.base_config())
        files = rename_as_in_model(open_checkpoint(local_folder(stored.whole_folder), stored.whole_place), causal)
        content.tensors = dict(merged_sources(with_tied(files, causal), stored, content.config))
    else:
        content.tensors = {name: InMemory(tensor) for name, tensor in stored.adapters[-1].named_in_model().items()}
    if (scalar := read_scalar(stored.folder, stored.place)) is not None:
        content.tensors[SCALAR] = InMemory(scalar)
    return content


# --- what must be there -------------------------------------------------------------------------------------


@dataclass
class _Claim:
    """The source that the model at a place claims."""

    place: str
    lineage: Mapping[str, Any]
    is_whole: bool
    found: Comparison
    opened: ExitStack

    def own_config(self) -> PreTrainedConfig:
        """The configuration that stands with the model."""
        with local_files(self.place, (".json",)) as folder:
            return read_config(folder, self.place)


class _Exported(_Claim):
    """An artifact, or where that is an adapter and this is not, what it makes of its base."""

    def required(self) -> Content:
        claimed = self.lineage[EXPORTED_FROM]
        source = claimed["place"]
        if not storage.exists(source) or digest_of(source) != claimed["sha256"]:
            self.found.not_compared.append(f"the artifact at '{source}' is not there any more, or is another one now")
            return Content()
        stored = self.opened.enter_context(open_model(source))
        is_merged = self.is_whole and bool(stored.adapters)
        content = _content(stored if self.is_whole else StoredModel("", "", stored.adapters[-1:]))
        content.generation = stored.generation_config()
        _compare_files(self.place, source, self.found, is_merged)
        base = f", merged into its base at '{stored.whole_place}'" if is_merged else ""
        self.found.compared_with.append(f"the artifact at '{source}'{base}")
        return content


class _Trained(_Claim):
    """The last checkpoint of a stage, and the model that it began with."""

    def required(self) -> Content:
        if "model" not in self.lineage:
            self.found.not_compared.append("its weights were merged, not trained, and are not computed again")
            return Content()
        stage = self._stage()
        content = self._begun_with(stage) or Content()
        trained = self._last_checkpoint(stage)
        if not self.is_whole:
            content = self._beside_base(content, trained or {})
        elif content.config is not None or trained is not None:
            content.tensors = self._whole(content, trained)
        return content

    def _beside_base(self, begun: Content, trained: Mapping[str, LazyTensor]) -> Content:
        """Of what was trained all that the base does not have: a tied head stands in checkpoints, and in no adapter."""
        size = begun.config.get_text_config().vocab_size if begun.config is not None else 0
        base = begun.values()
        if base:
            is_of_base = {name for name in trained if name in base and _same(trained[name], base[name], size)}
        else:  # where it is not there, what has no mark of an adapter may be of it
            is_of_base = {name for name in trained if name != SCALAR and not is_adapter_part(name)}
        tensors: dict[str, LazyTensor | None] = {
            name: tensor for name, tensor in trained.items() if name not in is_of_base
        }
        return Content(tensors, generation=begun.generation)

    def _whole(self, begun: Content, trained: Mapping[str, LazyTensor] | None) -> dict[str, LazyTensor | None]:
        """The trained values over those that training began with, which are not known where it is not known what was
        trained; under both names what is one tensor."""
        config = begun.config or self.own_config()
        causal = weightless(config)
        if is_tied(config) and has_own_head(begun.values(), causal):
            config = copy.deepcopy(config)
            untie(config)
            causal = weightless(config)
        wanted = causal.state_dict().keys()
        tensors = begun.tensors or dict.fromkeys(wanted)
        whole = {name: tensor for name, tensor in tensors.items() if name in wanted or name == SCALAR}
        whole = dict.fromkeys(whole) if trained is None else {**whole, **with_tied(trained, causal)}
        return {**whole, **dict.fromkeys(self._scores(wanted), whole.get(SCALAR))}

    def _scores(self, wanted: Container[str]) -> list[str]:
        """The name of the scoring head in files of transformers' sequence classification."""
        config = self.own_config()
        if not any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
            return []
        with torch.device("meta"):
            names = from_config(AutoModelForSequenceClassification, config).state_dict()
        return [name for name in names if name not in wanted]

    def _stage(self) -> Stage | None:
        above = storage.parent(self.place.rstrip("/"))
        stage = find(above) if storage.exists(self.place) and artifact_of(above) is not None else None
        return stage if stage is not None and stage.uri == above else None

    def _last_checkpoint(self, stage: Stage | None) -> dict[str, LazyTensor] | None:
        """The policy's trained weights after the last step, whole, by their names in transformers' model."""
        steps = self.lineage.get("steps")
        uri = next((saved.uri for saved in stage.checkpoints() if saved.step == steps), None) if stage else None
        if uri is None:
            why = "it lies in no run" if stage is None else f"the stage '{stage.name}' has none of step {steps}"
            self.found.not_compared.append(f"no checkpoint can be found that says what was trained: {why}")
            return None
        self.found.compared_with.append(f"the checkpoint '{uri}'")
        storage.verify(uri)
        state = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in Reader(uri).read_metadata().state_dict_metadata.items()
            if name.startswith(POLICY) and isinstance(entry, TensorStorageMetadata)
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that there is one process alone
            load(uri, state, alone=True)
        return {name.removeprefix(POLICY).removeprefix("causal."): InMemory(value) for name, value in state.items()}

    def _begun_with(self, stage: Stage | None) -> Content | None:
        """What the model holds that training began with; of one that was new the names alone."""
        start = self.lineage.get("model") or {}
        if "new" in start:
            config = configuration(ModelFrom.model_validate(start), None, load_tokenizer(self.place))
            return Content(dict.fromkeys(weightless(config).state_dict()), config)
        place = self._start(start, stage)
        if place is None:
            self.found.not_compared.append("the model that training began with is not there any more, or is another")
            return None
        stored = self.opened.enter_context(open_model(place))
        try:
            content = _content(stored)
        except NotInParts:
            if self.is_whole:
                raise
            content = Content()  # of an adapter all that was trained is looked for
        content.generation = stored.generation_config()
        self.found.compared_with.append(f"the model at '{place}', with which training began")
        return content

    def _start(self, start: Mapping[str, Any], stage: Stage | None) -> str | None:
        """Where the model stands that training began with, as it was then. What a hub has is believed to be that."""
        if path := start.get("path"):
            files = self.lineage.get("files", {}).get(f"stages.{self.lineage['stage']}.model.path", {})
            same = all(_is_as_it_was(uri, content) for uri, content in files.items() if _makes_the_model(uri))
            return (artifact_of(path) or path) if same else None
        parents = (parent for parent in self.lineage.get("parents", ()) if parent["stage"] == start.get("from"))
        parent = next(parents, None)
        return place_of(Run(storage.parent(storage.parent(stage.uri))), parent) if stage and parent else None


def _makes_the_model(uri: str) -> bool:
    """Whether a file holds weights or a configuration, which are compared by what they say."""
    return uri.endswith((".safetensors", ".bin")) or storage.name(uri) in _CONFIGS


def _is_as_it_was(uri: str, content: str) -> bool:
    """Whether a file still has the content that stands for it in a lineage: its stamp or its digest."""
    return storage.exists(uri) and (storage.modified_fingerprint(uri) == content or storage.sha256_of(uri) == content)


def _stops(lineage: Mapping[str, Any], place: str, begun: GenerationConfig | None) -> set[int] | None:
    """The tokens at which generation must stop; None where it is not known what was trained."""
    if "stop_ids" not in lineage:
        return None
    return {*lineage["stop_ids"], *_ends(begun), *_listed(load_tokenizer(place, as_found=True).eos_token_id)}


# --- what is there ------------------------------------------------------------------------------------------


def _compare(required: Content, actual: Content, found: Comparison) -> None:
    """Note what is not as it must be."""
    if required.tensors:
        both = required.tensors.keys() & actual.tensors.keys()
        size = actual.config.get_text_config().vocab_size if actual.config is not None else 0
        found.note("missing weights", required.tensors.keys() - actual.tensors.keys())
        found.note("weights without a place", actual.tensors.keys() - required.tensors.keys())
        other = [name for name in both if not _same(required.tensors[name], actual.tensors[name], size)]
        found.note("other weights", other)
    if actual.config is not None:
        if required.config is not None:
            found.note("config.json", _changed(_settings(required.config), _settings(actual.config)))
        if is_tied(actual.config) and has_own_head(actual.values(), weightless(actual.config)):
            found.note("config.json", ["tie_word_embeddings: the head is not the embedding"])
    if required.generation is None and required.stops is None:
        return
    if actual.generation is None:
        found.note(GENERATION_CONFIG_NAME, ["missing"])
        return
    if required.generation is not None:
        before, now = required.generation.to_diff_dict(), actual.generation.to_diff_dict()
        found.note(GENERATION_CONFIG_NAME, _changed(before, now))
    stops = _ends(required.generation) if required.stops is None else required.stops
    lost, added = stops - _ends(actual.generation), _ends(actual.generation) - stops
    found.note(GENERATION_CONFIG_NAME, [f"eos_token_id: lacks {token}" for token in lost])
    if required.generation is not None and required.stops is not None:
        found.note(GENERATION_CONFIG_NAME, [f"eos_token_id: has {token}" for token in added])


def _same(required: LazyTensor | None, actual: LazyTensor | None, vocabulary: int) -> bool:
    """But for the padding of the vocabulary, which an artifact has not, and for rows of tokens that were added."""
    if required is None or actual is None:
        return True
    rows, there = (tensor.shape[0] if tensor.shape else 0 for tensor in (required, actual))
    is_of_tokens = there == vocabulary and (rows < there or rows == padded_size(there))
    if required.shape[1:] != actual.shape[1:] or not (rows == there or is_of_tokens):
        return False
    expected, written = read_whole(required), read_whole(actual)
    if is_of_tokens:
        expected, written = expected[: min(rows, there)], written[: min(rows, there)]
    return torch.equal(expected.to(written.dtype), written)


def _compare_files(place: str, committed: str, found: Comparison, is_merged: bool = False) -> None:
    """Note which files are not those that were committed at a place; where an adapter was merged, those beside it."""
    if not storage.is_committed(committed):
        return
    for name, digest in storage.read_marker(committed).files.items():
        if is_merged and name != SCALAR_FILE and _makes_the_model(name):
            continue
        if name == LINEAGE_FILE and place != committed:
            continue
        uri = storage.join(place, name)
        if not storage.exists(uri):
            found.note("files", [f"{name}: missing"])
        elif storage.sha256_of(uri) != digest.sha256:
            found.note("files", [f"{name}: changed"])


def _settings(config: PreTrainedConfig) -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if not key.endswith("_config")}


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"{key}: {before.get(key)} -> {now.get(key)}"
        for key in before.keys() | now.keys()
        if key not in _FREE and before.get(key) != now.get(key) and not (key in _FILLED and before.get(key) is None)
    ]


def _generation_config(folder: str) -> GenerationConfig | None:
    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError:
        return None


def _ends(config: GenerationConfig | None) -> set[int]:
    return set() if config is None else set(_listed(config.eos_token_id))


def _listed(tokens: int | list[int] | None) -> list[int]:
    return [] if tokens is None else tokens if isinstance(tokens, list) else [tokens]
