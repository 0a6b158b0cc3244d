"""Where a model is, and what its directory holds: files by name, its configuration, and errors for the user."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import find_adapter_config_file
from transformers.utils import logging as transformers_logging

from postlude import storage
from postlude.data.remote_code import REMEDY, is_trusted
from postlude.manifest.problem import ManifestError
from postlude.nearest import suggestion

ADAPTER_CONFIG_FILE, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
"""The files of an adapter, as PEFT names them."""
LINEAGE_FILE = "lineage.json"
EXPORTED_FROM = "exported_from"
"""In the lineage of an exported folder: the place and the hash of the artifact that it was made of."""
SCALAR_FILE = "scalar_head.safetensors"
"""Holds the head ``scalar`` in the directory of a model that has one, beside the files that transformers knows."""
LM_HEAD_FILE = "lm_head.safetensors"
"""Holds the head that predicts tokens where the directory is a sequence classification, which has no such head."""


def is_adapter_part(name: str) -> bool:
    """Whether a parameter, by its name in a model, is one that an adapter has put in."""
    return ".lora_" in name


@contextmanager
def local_files(place: str, endings: tuple[str, ...] = ("",)) -> Iterator[str]:
    """A path or hub name for what stands at ``place``; files with these endings are fetched if it is remote, or
    encrypted."""
    if storage.has_path(place) or (storage.is_local(place) and not storage.exists(place)):
        path = storage.local_path(place)
        yield path if Path(path).exists() else place
        return
    with storage.folder_for_copy(place, "model") as folder:
        for name in storage.list_directory(place):
            if name.endswith(endings):
                with storage.open_file(storage.join(place, name), "rb") as source, Path(folder, name).open("wb") as out:
                    shutil.copyfileobj(source, out)
        yield folder


def local_folder(folder: str, patterns: tuple[str, ...] = ("*.json", "*.safetensors")) -> Path:
    """The path of what :func:`local_files` gives; of a hub name files with these patterns are downloaded."""
    return Path(folder if Path(folder).exists() else snapshot_download(folder, allow_patterns=list(patterns)))


def adapter_folder(folder: str) -> str | None:
    """Where the files of an adapter are, of a local folder or a hub name that holds one; of the latter they are
    downloaded. None for what is no adapter."""
    if Path(folder).exists():
        return folder if Path(folder, ADAPTER_CONFIG_FILE).exists() else None
    try:
        is_adapter = find_adapter_config_file(folder) is not None
    except (OSError, ValueError):
        return None  # there is no such model, which is told when its configuration is read
    patterns = ["*.json", "*.model", "*.txt", "*.jinja", "adapter_model.*", SCALAR_FILE]
    return snapshot_download(folder, allow_patterns=patterns) if is_adapter else None


def absolute(place: str) -> str:
    """A place that means the same from any folder."""
    if storage.is_local(place) and (path := Path(storage.local_path(place))).exists():
        return str(path.absolute())
    return place


def read_config(folder: str, place: str) -> PreTrainedConfig:
    """The configuration of a model in a local folder or on the hub. ManifestError if there is none, or the weights are
    quantised."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=is_trusted(folder))
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        if "trust_remote_code" in str(error):
            raise ManifestError(f"The model at '{place}' cannot be loaded. {REMEDY}") from error
        raise ManifestError(
            f"There is no model to load at '{place}': {one_line(error)} Give a Hugging Face directory, a hub name, "
            "or RUN/STAGE."
        ) from error
    if getattr(config, "quantization_config", None):
        raise ManifestError(
            f"The model at '{place}' is quantised, and quantised weights cannot be trained. Give a checkpoint in "
            "bf16, fp16 or fp32."
        )
    return config


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
def config_errors(what: str) -> Iterator[None]:
    """Translate what transformers and torch raise when the numbers of a configuration do not fit each other."""
    try:
        yield
    except (StrictDataclassError, ValueError, TypeError, KeyError, RuntimeError, ZeroDivisionError) as error:
        raise ManifestError(f"{what}: {one_line(error)} Look at model.new.config.") from error


def one_line(error: BaseException) -> str:
    """The message of an error as a sentence on one line."""
    text = " ".join(str(error).split())
    return text if text.endswith((".", "!", "?")) else f"{text}."
