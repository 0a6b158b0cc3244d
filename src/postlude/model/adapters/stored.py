"""Adapters in files, in PEFT's format, and what of a model's files are adapters."""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from peft import PeftConfig
from peft.utils import load_peft_weights
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig

from postlude import storage
from postlude.manifest.problem import ManifestError
from postlude.model.adapters.known import check_known
from postlude.model.attached import ADAPTER_NAME, Attached, Base
from postlude.model.places import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    LINEAGE_FILE,
    absolute,
    adapter_folder,
    local_files,
    one_line,
    read_config,
)

PREFIX = "base_model.model."
"""Before the name of every tensor in PEFT's files."""
_PLAIN_NAME = re.compile(re.escape(PREFIX) + r".+\.(lora_[AB]\.weight|lora_magnitude_vector)")
"""Of the tensors of an adapter that is products beside linear layers and nothing else."""


@dataclass(frozen=True)
class StoredModel:
    """The files of a model: those of a whole one, and of the adapters on it, each trained on what comes before it."""

    whole_folder: str
    """A local folder, or a hub name."""
    whole_place: str
    adapters: tuple[StoredAdapter, ...] = ()

    @property
    def folder(self) -> str:
        """What stands at the place of the model."""
        return self.adapters[-1].folder if self.adapters else self.whole_folder

    @property
    def place(self) -> str:
        return self.adapters[-1].place if self.adapters else self.whole_place

    def base_config(self) -> PreTrainedConfig:
        """The configuration of the whole model, as it is without the adapters."""
        try:
            return read_config(self.whole_folder, self.whole_place)
        except ManifestError as error:
            if not self.adapters:
                raise
            raise ManifestError(f"The base of the adapter at '{self.adapters[0].place}': {error}") from error

    def generation_config(self) -> GenerationConfig | None:
        """That of the model at the place: of the last adapter that has one, or of the whole model."""
        for folder in (*(adapter.folder for adapter in reversed(self.adapters)), self.whole_folder):
            try:
                return GenerationConfig.from_pretrained(folder)
            except OSError:
                continue
        return None


@contextmanager
def open_model(place: str, endings: tuple[str, ...] = ("",), above: tuple[str, ...] = ()) -> Iterator[StoredModel]:
    """The files of the model at a place, a Hugging Face directory (a path or URI), an adapter, or a hub name; of what
    is remote those with these endings are fetched, and adapters in full. A folder that is both is an adapter; if it
    names itself as its base (``above`` are the adapters on what is opened), that is the rest of the folder.

    ManifestError for an adapter that is not known here, or whose base is not there or not the one that was adapted.
    """
    with local_files(place, (*endings, ADAPTER_FILE)) as folder:
        found = adapter_folder(folder)
        if found is None:
            yield StoredModel(folder, place)
            return
        if absolute(place) in above[-1:]:
            with _without_adapter(folder) as rest:
                yield StoredModel(rest, place)
            return
        adapter = StoredAdapter(found, place)
        adapter.check_base()
        if absolute(adapter.base.place) in above:
            raise ManifestError(f"The adapters at '{place}' and '{adapter.base.place}' name each other as their base.")
        with open_model(adapter.base.place, endings, (*above, absolute(place))) as base:
            yield replace(base, adapters=(*base.adapters, adapter))


@contextmanager
def _without_adapter(folder: str) -> Iterator[str]:
    """A folder without the adapter in it, which transformers would load beside the model."""
    with storage.scratch_folder("model") as rest:
        for path in Path(folder).absolute().iterdir():
            if not path.name.startswith("adapter_"):
                Path(rest, path.name).symlink_to(path)
        yield rest


class StoredAdapter:
    """An adapter in a local folder, in PEFT's format. ManifestError if it cannot be read, or is not known here."""

    def __init__(self, folder: str, place: str) -> None:
        self.folder, self.place = folder, place
        with self._readable():
            keys = json.loads(Path(folder, ADAPTER_CONFIG_FILE).read_text(encoding="utf-8"))
            self.is_plain = check_known(keys, place)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what it ignores is refused above
                self.config: Any = PeftConfig.from_pretrained(folder)
        unknown = keys.keys() - {field.name for field in fields(self.config)}
        check_known({"peft_type": "LORA", **{key: keys[key] for key in unknown}}, place)
        if self.is_plain:
            self.is_plain = all(_PLAIN_NAME.fullmatch(name) for name in self.tensors)
            self.config.init_lora_weights = True

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, TypeError, KeyError, ImportError, UnpicklingError, SafetensorError) as error:
            raise ManifestError(f"The adapter at '{self.place}' cannot be read: {one_line(error)}") from error

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """By their names in the file."""
        with self._readable():
            if not any(Path(self.folder, name).exists() for name in (ADAPTER_FILE, "adapter_model.bin")):
                raise FileNotFoundError(f"there is no {ADAPTER_FILE}.")
            return load_peft_weights(self.folder, device="cpu")

    @cached_property
    def base(self) -> Base:
        """The model that it belongs to, as its lineage or PEFT's file says."""
        lineage = Path(self.folder, LINEAGE_FILE)
        entry = json.loads(lineage.read_text(encoding="utf-8")).get("base") if lineage.exists() else None
        place = entry["place"] if entry else self.config.base_model_name_or_path
        if not place:
            raise ManifestError(f"The adapter at '{self.place}' does not say which model it belongs to.")
        digest = entry["sha256"] if entry else None
        return Base(_found(place, self.place, digest), digest)

    def check_base(self) -> None:
        """ManifestError if the base is not there, or not the one that was adapted."""
        base = self.base
        if base.place.startswith(("/", "file:")) and not storage.exists(base.place):
            raise ManifestError(
                f"The adapter at '{self.place}' belongs to the model at '{base.place}', which is not there. Put it "
                "back, or give a merged model."
            )
        if base.digest is not None and (digest := digest_of(base.place)) != base.digest:
            raise ManifestError(
                f"The adapter at '{self.place}' was trained on a model at '{base.place}' whose files had the hash "
                f"{base.digest[:12]}, and the files there have {digest[:12]} now. An adapter only fits the weights "
                "that it was trained on: bring these back, or train it anew."
            )

    def named_in_model(self) -> dict[str, Tensor]:
        """The tensors by the names that they have in a model with the adapter in it."""
        return {_name_in_model(name.removeprefix(PREFIX)): tensor.float() for name, tensor in self.tensors.items()}


def _found(named: str, adapter: str, digest: str | None) -> str:
    """Where a base is that an adapter names. A relative path is meant from where the program runs, as for PEFT, else
    from the adapter's folder, and of one with a digest from any folder above it."""
    if not (storage.is_local(named) and storage.is_local(adapter)) or Path(named).is_absolute():
        return named
    folder = Path(storage.local_path(adapter)).absolute()
    roots = (Path.cwd(), folder, *(folder.parents if digest else ()))
    there = [str(path) for root in roots if (path := Path(os.path.normpath(root / named))).is_dir()]
    same = (path for path in there if digest is None or digest_of(path) == digest)
    return next(same, there[0] if there else named)


def digest_of(place: str) -> str:
    """One hash over the weights and the configuration at a place; of a hub name that of its commit."""
    if storage.is_committed(place):
        files = {name: digest.sha256 for name, digest in storage.read_marker(place).files.items()}
    elif storage.is_directory(place):
        uris = {name: storage.join(place, name) for name in storage.list_directory(place) if _counts(name)}
        files = {name: _sha256(uri, storage.modified_fingerprint(uri)) for name, uri in uris.items()}
    else:
        commit = getattr(read_config(place, place), "_commit_hash", None)
        return hashlib.sha256(f"{place}@{commit}".encode()).hexdigest()
    listed = "".join(f"{files[name]}  {name}\n" for name in sorted(files) if _counts(name))
    return hashlib.sha256(listed.encode()).hexdigest()


def _counts(name: str) -> bool:
    return name.endswith((".safetensors", ".bin")) or name in ("config.json", ADAPTER_CONFIG_FILE)


@cache
def _sha256(uri: str, stamp: str) -> str:
    """Of a file that has not changed since it had this stamp."""
    with storage.open_file(uri, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]


def write_adapter_files(tensors: Mapping[str, Tensor], attached: Attached, folder: Path) -> None:
    """Write an adapter as PEFT does, but for the order of sets, in which PEFT's files differ from process to process.
    ``tensors`` are by their names in the model, whole."""
    config = replace(attached.config, inference_mode=True, base_model_name_or_path=attached.base.place)
    config.save_pretrained(str(folder))
    file = folder / ADAPTER_CONFIG_FILE
    keys = json.loads(file.read_text())
    ordered = {key: sorted(keys[key]) for key in keys if isinstance(getattr(config, key, None), set)}
    file.write_text(json.dumps(keys | ordered, indent=2, sort_keys=True))
    named = {f"{PREFIX}{_name_in_file(name)}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named, folder / ADAPTER_FILE, metadata={"format": "pt"})


def _name_in_file(name: str) -> str:
    """A tensor's name in PEFT's files: without the adapter's own name."""
    name = name.replace(f".lora_magnitude_vector.{ADAPTER_NAME}.weight", ".lora_magnitude_vector")
    return name.replace(f".{ADAPTER_NAME}.", ".")


def _name_in_model(name: str) -> str:
    if name.endswith(".lora_magnitude_vector"):
        return f"{name}.{ADAPTER_NAME}.weight"
    path, dot, last = name.rpartition(".")
    return f"{path}.{ADAPTER_NAME}{dot}{last}"
