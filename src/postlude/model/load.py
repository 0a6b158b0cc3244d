"""Models from a checkpoint or from a configuration with random weights, and nothing silently different.

Weights are fp32 masters whatever the checkpoint holds; its dtype is remembered for the artifact. A checkpoint
that lacks weights, a configuration key that no architecture reads, a tokenizer whose ids have no embedding:
each is an error here, where transformers would go on.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from postlude.data.tokenizer import NewTokens
from postlude.manifest.problem import ManifestError
from postlude.manifest.schema import ModelFrom, ModelPlace, NewModel
from postlude.model import vocabulary
from postlude.model.adapters.merge import config_of, read_merged
from postlude.model.adapters.start import Start, attach, load_adapted
from postlude.model.adapters.stored import StoredModel, open_model
from postlude.model.added_tokens import add_tokens, config_with_tokens
from postlude.model.attached import AdapterRequest
from postlude.model.causal import construct_causal, random_causal, with_weights_in
from postlude.model.language_model import LanguageModel
from postlude.model.mesh import Mesh
from postlude.model.places import config_errors, configuration_keys
from postlude.model.sharded import check_names, load_sharded, shard_new
from postlude.model.weights import read_scalar
from postlude.nearest import suggestion


def load_model(
    start: ModelPlace,
    place: str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    seed: int,
    adapter: AdapterRequest | None = None,
    new_tokens: NewTokens | None = None,
) -> LanguageModel:
    """The model that a stage starts from, on the CPU with fp32 weights.

    ``place`` is a Hugging Face directory (a path or URI) or a hub name; it is None where ``start`` asks for a new
    model, whose random weights follow from ``seed`` and whose vocabulary follows ``tokenizer`` unless the
    manifest gives it. Where there is an adapter at ``place`` it is merged into its base; with an ``adapter`` that is
    asked for, the rest of the weights is frozen. ManifestError for what is not there, incomplete, unknown, or does not
    fit the tokenizer.
    """
    if place is None:
        config = configuration(start, None, tokenizer)
        model = LanguageModel(random_causal(config, seed))
        if adapter is not None:
            attach(model, Start(adapter, f"new {config.model_type}"))
        return model
    with open_model(place) as stored:
        config = _config_of(stored, tokenizer, new_tokens)
        if adapter is None:
            model = _load_trainable(stored, config, new_tokens)
        else:
            model = load_adapted(stored, config, adapter)
        model.causal.generation_config = stored.generation_config() or model.causal.generation_config
        if (scalar := read_scalar(stored.folder, stored.place)) is not None:
            model.add_scalar_head()
            model.scalar.load_state_dict({"weight": scalar})  # type: ignore[union-attr]
    return model


def _load_trainable(stored: StoredModel, config: PreTrainedConfig, new_tokens: NewTokens | None) -> LanguageModel:
    """A model with fp32 weights, which knows the dtype that the checkpoint holds."""
    dtype = config.dtype  # transformers changes it while loading
    causal = read_merged(stored, config, "auto" if dtype is None else torch.float32)
    dtype = dtype if isinstance(dtype, torch.dtype) else causal.dtype
    causal = causal.float()
    if new_tokens is not None:
        add_tokens(causal, new_tokens)
    return LanguageModel(causal, dtype)


def _config_of(
    stored: StoredModel, tokenizer: PreTrainedTokenizerBase | None, new_tokens: NewTokens | None = None
) -> PreTrainedConfig:
    """The configuration of a model in files. ManifestError if the tokenizer does not fit it."""
    config = config_of(stored)
    if tokenizer is not None:
        size = config_with_tokens(config, new_tokens).get_text_config().vocab_size
        vocabulary.check_tokenizer(tokenizer, size, stored.place)
    return config


def load_divided(
    start: ModelPlace,
    place: str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    seed: int,
    mesh: Mesh,
    device: torch.device,
    scalar: bool = False,
    adapter: AdapterRequest | None = None,
    new_tokens: NewTokens | None = None,
) -> LanguageModel:
    """The model of :func:`load_model`, divided among the ranks of a mesh, which all call this: each reads only what is
    its own. Of a new model each draws all weights first, so that they do not depend on the mesh. ``scalar`` adds the
    head so named. ManifestError as there, and for what cannot be divided.
    """
    if place is None:
        causal = random_causal(configuration(start, None, tokenizer), seed)
        return shard_new(causal, mesh, device, scalar, adapter)
    with open_model(place) as stored:
        config = _config_of(stored, tokenizer, new_tokens)
        return load_sharded(stored, config, mesh, device, scalar, adapter, new_tokens)


def load_causal(
    start: ModelPlace,
    place: str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    seed: int,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """A model that is only run forward, as transformers has it, on the CPU; otherwise as :func:`load_model`.

    ``dtype`` is that of the weights, by default the one that they are stored in.
    """
    if place is None:
        causal = random_causal(configuration(start, None, tokenizer), seed)
    else:
        with open_model(place) as stored:
            causal = read_merged(stored, _config_of(stored, tokenizer), "auto")
            causal.generation_config = stored.generation_config() or causal.generation_config
    return (causal if dtype is None else with_weights_in(causal, dtype)).eval().requires_grad_(False)


def configuration(start: ModelPlace, place: str | None, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedConfig:
    """The configuration of the model that :func:`load_model` would make, without its weights."""
    if place is not None:
        with open_model(place, (".json",)) as stored:
            check_names(stored)
            return config_of(stored)
    if not isinstance(start, ModelFrom) or start.new is None:
        raise ValueError("A model that is not new needs the place of its files.")
    config = _new_config(start.new, tokenizer)
    if tokenizer is not None:
        size = config.get_text_config().vocab_size
        vocabulary.check_tokenizer(tokenizer, size, f"new {start.new.architecture}")
    return config


def weights_are_checked(place: str) -> bool:
    """Whether the weights at a place are here, so that :func:`configuration` tells those that have no place in the
    architecture. ManifestError as there."""
    with open_model(place, (".json",)) as stored:
        return check_names(stored)


def count_parameters(config: PreTrainedConfig) -> int:
    """How many parameters a model of this configuration has, tied ones once; nothing is allocated."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in construct_causal(config).parameters())


def _new_config(new: NewModel, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedConfig:
    known = configuration_keys(new.architecture)
    for key in new.config:
        if key not in known:
            raise ManifestError(
                f"model.new.config: '{key}' is not a key of the architecture '{new.architecture}'."
                f"{suggestion(key, known)} Its keys: {', '.join(sorted(known))}."
            )
    derived: dict[str, Any] = {"dtype": torch.float32}
    if tokenizer is not None:
        bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        derived |= {"vocab_size": vocabulary.tokenizer_size(tokenizer), "bos_token_id": bos, "eos_token_id": eos}
        # An embedding learns nothing for its padding token, so one that means something else cannot serve.
        derived["pad_token_id"] = None if pad in (bos, eos) else pad
    derived = {key: value for key, value in derived.items() if key in known}
    with config_errors(f"model.new: no '{new.architecture}' can be made of this configuration"):
        config = AutoConfig.for_model(new.architecture, **{**derived, **new.config})
        _check_heads(config.get_text_config())
    return config


def _check_heads(config: PreTrainedConfig) -> None:
    """ValueError where key-value heads cannot be shared out: an attention kernel would end the process."""
    heads, shared = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if heads and shared and heads % shared:
        raise ValueError(f"num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({shared}).")
