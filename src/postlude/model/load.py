"""Models from a checkpoint or from a configuration with random weights, and nothing silently different.

Weights are fp32 masters whatever the checkpoint holds; its dtype is remembered for the artifact. A checkpoint
that lacks weights, a configuration key that no architecture reads, a tokenizer whose ids have no embedding:
each is an error here, where transformers would go on.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from postlude import storage
from postlude.data.tokenizer import NewTokens
from postlude.manifest.problem import ManifestError
from postlude.manifest.schema import ModelFrom, ModelPlace, NewModel
from postlude.model import vocabulary
from postlude.model.added_tokens import grow, grown_config
from postlude.model.language_model import LM_HEAD_FILE, SCALAR_FILE, LanguageModel
from postlude.model.mesh import Mesh
from postlude.nearest import suggestion

if TYPE_CHECKING:
    from postlude.model.adapters import Asked

Model = TypeVar("Model", bound=torch.nn.Module)


def load_model(
    start: ModelPlace,
    place: str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    seed: int,
    adapter: Asked | None = None,
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
        model = LanguageModel(_random(config, seed))
        if adapter is not None:
            from postlude.model.adapted import attach_new

            attach_new(model, adapter, f"new {config.model_type}")
        return model
    with local_files(place) as folder:
        config = read_config(folder, place)
        if tokenizer is not None:
            size = grown_config(config, new_tokens).get_text_config().vocab_size
            vocabulary.check_tokenizer(tokenizer, size, place)
        if adapter is None:
            causal, stored = _read_weights(folder, place, config)
            if new_tokens is not None:
                grow(causal, new_tokens)
            model = LanguageModel(causal, stored)
        else:
            from postlude.model.adapted import load_adapted

            model = load_adapted(folder, place, config, adapter)
        scalar = Path(folder) / SCALAR_FILE
        if scalar.exists():
            model.add_scalar_head()
            model.scalar.load_state_dict(load_file(scalar))  # type: ignore[union-attr]
    return model


def load_divided(
    start: ModelPlace,
    place: str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    seed: int,
    mesh: Mesh,
    device: torch.device,
    scalar: bool = False,
    adapter: Asked | None = None,
    new_tokens: NewTokens | None = None,
) -> LanguageModel:
    """The model of :func:`load_model`, divided among the ranks of a mesh, which all call this: each reads only what is
    its own. Of a new model each draws all weights first, so that they do not depend on the mesh. ``scalar`` adds the
    head so named. ManifestError as there, and for what cannot be divided.
    """
    from postlude.model.sharded import load_sharded, shard_new

    if place is None:
        return shard_new(_random(configuration(start, None, tokenizer), seed), mesh, device, scalar, adapter)
    with local_files(place) as folder:
        config = read_config(folder, place)
        if tokenizer is not None:
            size = grown_config(config, new_tokens).get_text_config().vocab_size
            vocabulary.check_tokenizer(tokenizer, size, place)
        if not Path(folder).exists():
            from huggingface_hub import snapshot_download

            folder = snapshot_download(folder, allow_patterns=["*.json", "*.safetensors"])
        return load_sharded(folder, place, config, mesh, device, scalar, adapter, new_tokens)


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
        causal = _random(configuration(start, None, tokenizer), seed)
    else:
        with local_files(place) as folder:
            config = read_config(folder, place)
            if tokenizer is not None:
                vocabulary.check_tokenizer(tokenizer, config.get_text_config().vocab_size, place)
            causal = read_causal(folder, place, config, "auto")
    return (causal if dtype is None else with_weights_in(causal, dtype)).eval().requires_grad_(False)


def with_weights_in(model: Model, dtype: torch.dtype) -> Model:
    """The model with its weights in another dtype. Buffers keep theirs: of rotary frequencies in bf16 come wrong
    positions."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def configuration(start: ModelPlace, place: str | None, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedConfig:
    """The configuration of the model that :func:`load_model` would make, without its weights."""
    if place is not None:
        with local_files(place, (".json",)) as folder:
            return read_config(folder, place)
    if not isinstance(start, ModelFrom) or start.new is None:
        raise ValueError("A model that is not new needs the place of its files.")
    config = _new_config(start.new, tokenizer)
    if tokenizer is not None:
        size = config.get_text_config().vocab_size
        vocabulary.check_tokenizer(tokenizer, size, f"new {start.new.architecture}")
    return config


def count_parameters(config: PreTrainedConfig) -> int:
    """How many parameters a model of this configuration has, tied ones once; nothing is allocated."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in _construct(config).parameters())


def configuration_keys(architecture: str) -> set[str]:
    """The keys that a configuration of this architecture reads. ManifestError for an unknown architecture."""
    known = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    if architecture not in known:
        raise ManifestError(
            f"'{architecture}' is not an architecture that predicts tokens from left to right."
            f"{suggestion(architecture, known)} Known to this transformers: {', '.join(known)}."
        )
    config = CONFIG_MAPPING[architecture]
    keys = {field.name for field in dataclasses.fields(config)} | set(config.attribute_map)
    return keys | {"rope_theta", "rope_scaling"} if "rope_parameters" in keys else keys


# --- new models ---------------------------------------------------------------------------------------------


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
    with _user_errors(f"model.new: no '{new.architecture}' can be made of this configuration"):
        config = AutoConfig.for_model(new.architecture, **{**derived, **new.config})
        _check_heads(config.get_text_config())
    return config


def _check_heads(config: PreTrainedConfig) -> None:
    """ValueError where key-value heads cannot be shared out: an attention kernel would end the process."""
    heads, shared = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if heads and shared and heads % shared:
        raise ValueError(f"num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({shared}).")


def _random(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _construct(config)


def _construct(config: PreTrainedConfig) -> PreTrainedModel:
    with _user_errors(f"model.new: no '{config.model_type}' can be made of this configuration"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@contextmanager
def _user_errors(what: str) -> Iterator[None]:
    """Translate what transformers and torch raise when the numbers of a configuration do not fit each other."""
    try:
        yield
    except (StrictDataclassError, ValueError, TypeError, KeyError, RuntimeError, ZeroDivisionError) as error:
        raise ManifestError(f"{what}: {_one_line(error)} Look at model.new.config.") from error


# --- checkpoints --------------------------------------------------------------------------------------------


def read_config(folder: str, place: str) -> PreTrainedConfig:
    """The configuration of a model; of an adapter that of its base."""
    if Path(folder, "adapter_config.json").exists():
        from postlude.model import adapters

        if adapters.is_adapter(folder):
            stored = adapters.StoredAdapter(folder, place)
            with stored.base_folder((".json",)) as base:
                return read_config(base, stored.base.place)
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise ManifestError(
            f"There is no model to load at '{place}': {_one_line(error)} Give a Hugging Face directory, a hub name, "
            "or RUN/STAGE."
        ) from error
    if getattr(config, "quantization_config", None):
        raise ManifestError(
            f"The model at '{place}' is quantised, and quantised weights cannot be trained. Give a checkpoint in "
            "bf16, fp16 or fp32."
        )
    return config


def _read_weights(folder: str, place: str, config: PreTrainedConfig) -> tuple[PreTrainedModel, torch.dtype]:
    """The model with fp32 weights, and the dtype that the checkpoint holds."""
    stored = config.dtype  # transformers changes it while loading
    causal = read_causal(folder, place, config, "auto" if stored is None else torch.float32)
    stored = stored if isinstance(stored, torch.dtype) else causal.dtype
    return causal.float(), stored


def read_causal(
    folder: str, place: str, config: PreTrainedConfig, dtype: torch.dtype | Literal["auto"]
) -> PreTrainedModel:
    """A transformers model from its files, every weight of it, with what is an adapter merged into its base.

    ManifestError if files are broken or incomplete.
    """
    if Path(folder, "adapter_config.json").exists():
        from postlude.model import adapters

        if adapters.is_adapter(folder):
            return adapters.read_merged(folder, place, config, dtype)
    try:
        with quiet() if Path(folder).exists() else nullcontext():  # a download shows how far it is
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, config=config, dtype=dtype, output_loading_info=True
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ManifestError(f"The model at '{place}' cannot be loaded: {_one_line(error)}") from error
    causal, report = loaded
    beside = Path(folder) / LM_HEAD_FILE
    head = load_file(beside) if beside.exists() else {}
    causal.load_state_dict(head, strict=False)
    missing = sorted(set(report["missing_keys"]) - set(head))
    if missing:
        raise ManifestError(
            f"The model at '{place}' is incomplete: {len(missing)} weights of the architecture '{config.model_type}' "
            f"are not in its files, the first being '{missing[0]}'. Give a complete causal language model."
        )
    return causal


@contextmanager
def quiet() -> Iterator[None]:
    """While this is open, transformers shows no progress bars and reports no weights: a run has its own display."""
    shown, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shown:
            transformers_logging.enable_progress_bar()


@contextmanager
def local_files(place: str, endings: tuple[str, ...] = ("",)) -> Iterator[str]:
    """A path or hub name for what stands at ``place``; files with these endings are fetched if it is remote."""
    if storage.is_local(place):
        path = storage.local_path(place)
        yield path if Path(path).exists() else place
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in storage.list_directory(place):
            if name.endswith(endings):
                with storage.open_file(storage.join(place, name), "rb") as source, Path(folder, name).open("wb") as out:
                    shutil.copyfileobj(source, out)
        yield folder


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if text.endswith((".", "!", "?")) else f"{text}."
