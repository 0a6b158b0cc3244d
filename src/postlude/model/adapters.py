"""Adapters: what is trained is small, the base is frozen, and an artifact holds the one and names the other.

PEFT puts the layers in; its file format is that of the artifact, so that anything that knows PEFT loads it. What is
ours is where the weights come from (drawn by name, equal on every mesh), which base they belong to (by the hash of its
files), and the merging, which rounds once.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from postlude import storage
from postlude.data.batch import PackedBatch
from postlude.manifest.adapter import Adapter
from postlude.manifest.problem import ManifestError
from postlude.model.anatomy import name_of
from postlude.model.language_model import LanguageModel, is_adapter_part
from postlude.model.weights import InMemory, LazyTensor, Region

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""Before the name of every tensor in PEFT's files."""
NAME = "default"


@dataclass(frozen=True)
class Base:
    """The model that an adapter belongs to."""

    place: str
    digest: str | None
    """Of its files; None where the adapter does not say."""


@dataclass(frozen=True)
class Attached:
    """The adapter of a model that is trained."""

    config: LoraConfig
    base: Base


@dataclass(frozen=True)
class Asked:
    """The adapter that a stage asks for."""

    adapter: Adapter
    seed: int
    hold: Callable[[torch.dtype], torch.dtype]
    """From the dtype that weights are stored in to that which the frozen ones are held in."""


@dataclass(frozen=True)
class Change:
    """What an adapter makes of one weight [out, in], all in fp32."""

    a: Tensor
    """[rank, in]."""
    b: Tensor
    """[out, rank]."""
    scaling: float
    magnitude: Tensor | None
    """[out]: the length that each row has in the end (DoRA)."""

    def apply(self, weight: Tensor, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
        """The changed rows and columns, out of these rows of the weight, [rows, in]; in fp32."""
        changed = weight.float() + self.scaling * (self.b[rows] @ self.a)
        if self.magnitude is not None:
            changed *= (self.magnitude[rows] / torch.linalg.norm(changed, dim=1))[:, None]
        return changed[:, columns]


def base_state(
    state: Mapping[str, Tensor], config: LoraConfig, merge: bool, whole: Callable[[Tensor], Tensor] = Tensor.detach
) -> Iterator[tuple[str, Tensor]]:
    """The state of a model with an adapter in it as that of its base, tensor by tensor; to ``merge`` is to make the
    changes in its weights. ``whole`` makes the tensor of which ranks hold parts: all of them go through the same."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        path, inside, rest = name.partition(".lora_")
        if inside:
            parts.setdefault(path, {})[rest.split(".")[0]] = tensor
    scaling = scaling_of(config)
    for name, tensor in state.items():
        if is_adapter_part(name):
            continue
        path, inside, rest = name.partition(".base_layer.")
        gathered = whole(tensor)
        if merge and inside and rest == "weight":
            its = {part: whole(found).float() for part, found in parts[path].items()}
            change = Change(its["A"], its["B"], scaling, its.get("magnitude_vector"))
            gathered = change.apply(gathered).to(tensor.dtype)
        yield f"{path}.{rest}" if inside else name, gathered


@dataclass(frozen=True)
class Merged:
    """A weight with an adapter merged into it, of which parts can be read."""

    of: LazyTensor
    change: Change

    @property
    def shape(self) -> tuple[int, ...]:
        return self.of.shape

    def read(self, region: Region) -> Tensor:
        rows, columns = region
        stored = self.of.read((rows, slice(0, self.shape[1])))
        return self.change.apply(stored, rows, columns)


class StoredAdapter:
    """An adapter in a local folder, in PEFT's format. ManifestError if it cannot be read, or is of another kind."""

    def __init__(self, folder: str, place: str) -> None:
        self.folder, self.place = folder, place
        try:
            self.config: LoraConfig = LoraConfig.from_pretrained(folder)
            self.tensors = load_file(Path(folder, WEIGHTS))
        except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
            raise ManifestError(f"The adapter at '{place}' cannot be read: {' '.join(str(error).split())}") from error
        unknown = [
            key
            for key, usual in (
                ("bias", "none"),
                ("modules_to_save", None),
                ("rank_pattern", {}),
                ("alpha_pattern", {}),
                ("target_parameters", None),
                ("trainable_token_indices", None),
                ("fan_in_fan_out", False),
            )
            if (getattr(self.config, key, usual) or usual) != usual
        ]
        if unknown:
            raise ManifestError(
                f"The adapter at '{place}' uses {', '.join(unknown)} of PEFT, which is not known here. Merge it into "
                "its base with PEFT, and give the merged model."
            )

    @cached_property
    def base(self) -> Base:
        lineage = Path(self.folder, "lineage.json")
        told = json.loads(lineage.read_text(encoding="utf-8")).get("base") if lineage.exists() else None
        place = told["place"] if told else self.config.base_model_name_or_path
        if not place:
            raise ManifestError(f"The adapter at '{self.place}' does not say which model it belongs to.")
        return Base(place, told["sha256"] if told else None)

    @contextmanager
    def base_folder(self, endings: tuple[str, ...] = ("",)) -> Iterator[str]:
        """A local folder of the base, with the files that have these endings. ManifestError if it is not there, or not
        the one that was adapted."""
        from postlude.model.load import local_files

        base = self.base
        if base.place.startswith(("/", "file:")) and not storage.exists(base.place):
            raise ManifestError(
                f"The adapter at '{self.place}' belongs to the model at '{base.place}', which is not there. Put it "
                "back, or give a merged model."
            )
        if base.digest is not None and (found := digest_of(base.place)) != base.digest:
            raise ManifestError(
                f"The adapter at '{self.place}' was trained on a model at '{base.place}' whose files had the hash "
                f"{base.digest[:12]}, and the files there have {found[:12]} now. An adapter only fits the weights that "
                "it was trained on: bring these back, or train it anew."
            )
        with local_files(base.place, endings) as folder:
            yield folder

    @cached_property
    def changes(self) -> dict[str, Change]:
        """By the path of each module that is adapted."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self.tensors.items():
            path, _, rest = name.removeprefix(PREFIX).partition(".lora_")
            found.setdefault(path, {})[rest.split(".")[0]] = tensor.float()
        scaling = scaling_of(self.config)
        return {
            path: Change(parts["A"], parts["B"], scaling, parts.get("magnitude_vector"))
            for path, parts in found.items()
        }

    def inside(self) -> dict[str, Tensor]:
        """The tensors by the names that they have in a model with the adapter in it."""
        return {_inside(name.removeprefix(PREFIX)): tensor.float() for name, tensor in self.tensors.items()}


def is_adapter(folder: str) -> bool:
    """Whether a local folder holds an adapter, not a model."""
    return Path(folder, CONFIG).exists() and not Path(folder, "config.json").exists()


def scaling_of(config: LoraConfig) -> float:
    """What the product of the matrices is multiplied by."""
    return config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)


def digest_of(place: str) -> str:
    """One hash over the weights and the configuration at a place; of a hub name that of its commit."""
    if storage.is_committed(place):
        files = {name: digest.sha256 for name, digest in storage.read_marker(place).files.items()}
    elif storage.is_directory(place):
        uris = {name: storage.join(place, name) for name in storage.list_directory(place) if _counts(name)}
        files = {name: _sha256(uri, storage.modified_fingerprint(uri)) for name, uri in uris.items()}
    else:
        from transformers import AutoConfig

        commit = getattr(AutoConfig.from_pretrained(place), "_commit_hash", None)
        return hashlib.sha256(f"{place}@{commit}".encode()).hexdigest()
    listed = "".join(f"{files[name]}  {name}\n" for name in sorted(files) if _counts(name))
    return hashlib.sha256(listed.encode()).hexdigest()


def _counts(name: str) -> bool:
    return name.endswith((".safetensors", ".bin")) or name in ("config.json", CONFIG)


@cache
def _sha256(uri: str, stamp: str) -> str:
    """Of a file that has not changed since it had this stamp."""
    with storage.open_file(uri, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]


# --- into a model -------------------------------------------------------------------------------------------


def new_config(adapter: Adapter, causal: PreTrainedModel) -> LoraConfig:
    """PEFT's configuration of a new adapter for a model. ManifestError if its targets are not all there."""
    return LoraConfig(
        r=adapter.rank_in_full,
        lora_alpha=adapter.alpha_in_full,  # type: ignore[arg-type]
        target_modules=_shortest(targets_of(adapter, causal), causal),
        lora_dropout=adapter.dropout or 0.0,
        use_rslora=bool(adapter.rslora),
        use_dora=bool(adapter.dora),
        bias="none",
        task_type="CAUSAL_LM",
    )


def targets_of(adapter: Adapter, causal: PreTrainedModel) -> list[str]:
    """The paths of the linear layers that an adapter names."""
    groups = linear_layers(causal)
    paths = [path for members in groups.values() for path in members]
    if not paths:
        raise ManifestError(f"The architecture '{name_of(causal)}' has no linear layers that an adapter could change.")
    found: set[str] = set()
    for target in adapter.targets or [name for name, members in groups.items() if members]:
        members = groups.get(target) or [path for path in paths if path == target or path.endswith(f".{target}")]
        if not members:
            ends = sorted({path.rpartition(".")[2] for path in paths})
            raise ManifestError(
                f"adapter.targets: '{target}' is no linear layer of the architecture '{name_of(causal)}'. Choose among "
                f"{', '.join([*(name for name, members in groups.items() if members), *ends])}. Experts that are one "
                "tensor, embeddings and the head cannot be adapted."
            )
        found.update(members)
    return sorted(found)


def linear_layers(causal: PreTrainedModel) -> dict[str, list[str]]:
    """The paths of the linear layers inside the decoder layers: those in an attention, and the others."""
    groups: dict[str, list[str]] = {"attention": [], "mlp": []}
    for path, layer in causal.named_modules():
        if isinstance(layer, GradientCheckpointingLayer):
            for inner, module in layer.named_modules():
                if isinstance(module, nn.Linear):
                    way = [type(layer.get_submodule(part)).__name__ for part in _ancestors(inner)]
                    groups["attention" if any("Attention" in name for name in way) else "mlp"].append(f"{path}.{inner}")
    return groups


def _ancestors(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def _shortest(paths: list[str], causal: PreTrainedModel) -> list[str]:
    """The last parts of the paths, where these mean the same modules; PEFT understands both."""
    ends = sorted({path.rpartition(".")[2] for path in paths})
    meant = {path for path, _ in causal.named_modules() if path.rpartition(".")[2] in ends}
    return ends if meant == set(paths) else paths


def inject(causal: PreTrainedModel, config: LoraConfig) -> list[str]:
    """Put an adapter's layers in; its weights are empty where those of the model are. The paths that are adapted."""
    meta = next(causal.parameters()).is_meta
    with torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(replace(config, inference_mode=False), causal, NAME, low_cpu_mem_usage=meta)
    adapted = []
    for path, module in causal.named_modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False  # autocast decides in what is computed
            adapted.append(path)
    for name, parameter in causal.named_parameters():
        trained = is_adapter_part(name)
        parameter.requires_grad_(trained)
        if trained and not meta:
            parameter.data = parameter.data.float()
    return adapted


def starting_weights(
    causal: PreTrainedModel, adapted: list[str], seed: int, weights: Mapping[str, LazyTensor]
) -> dict[str, Tensor]:
    """What a new adapter begins with, by name: A drawn for each name alone, B zero, so that nothing changes at first.

    ``weights`` are those of the model without it, by the path of their module.
    """
    found: dict[str, Tensor] = {}
    for path in adapted:
        module: Any = causal.get_submodule(path)
        rank, width = module.lora_A[NAME].weight.shape
        number = int.from_bytes(hashlib.blake2b(f"{seed} {path}".encode(), digest_size=8).digest()) >> 1
        generator = torch.Generator().manual_seed(number)
        found[f"{path}.lora_A.{NAME}.weight"] = (torch.rand(rank, width, generator=generator) * 2 - 1) / math.sqrt(
            width
        )
        found[f"{path}.lora_B.{NAME}.weight"] = torch.zeros(module.out_features, rank)
        if NAME in module.lora_magnitude_vector:
            whole = weights[path].read(tuple(slice(0, size) for size in weights[path].shape))
            found[f"{path}.lora_magnitude_vector.{NAME}.weight"] = torch.linalg.norm(whole.float(), dim=1)
    return found


def weights_of(causal: PreTrainedModel, adapted: list[str]) -> dict[str, LazyTensor]:
    """The weights that are adapted, of a model that holds them, by the path of their module."""
    return {path: InMemory(causal.get_submodule(path).base_layer.weight.detach()) for path in adapted}  # type: ignore


def fill(causal: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    """Give a model's adapter its weights. ManifestError if they are not those that it has."""
    own = {name: parameter for name, parameter in causal.named_parameters() if is_adapter_part(name)}
    check_same(own, weights)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])


def check_same(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """ManifestError if an adapter's weights are not those that a model has a place for."""
    for name in sorted(own.keys() | weights.keys()):
        shapes = [tuple(found[name].shape) if name in found else None for found in (own, weights)]
        if shapes[0] != shapes[1]:
            raise ManifestError(
                f"The adapter does not fit its base: '{name}' is {shapes[1] or 'missing'} in its files, and "
                f"{shapes[0] or 'missing'} in the model."
            )


def read_merged(folder: str, place: str, config: Any, dtype: Any) -> PreTrainedModel:
    """A transformers model with the adapter in a folder merged into it, weight by weight; each is rounded once."""
    from postlude.model.load import read_causal

    stored = StoredAdapter(folder, place)
    with stored.base_folder() as base, torch.no_grad():
        causal = read_causal(base, stored.base.place, config, dtype)
        for path, change in stored.changes.items():
            weight = _linear(causal, path, place).weight
            _check_shape(change, tuple(weight.shape), path, place)
            weight.copy_(change.apply(weight))
    return causal


def merged_sources(sources: Mapping[str, LazyTensor], stored: StoredAdapter) -> dict[str, LazyTensor]:
    """The weights of a base with an adapter merged into them."""
    merged = dict(sources)
    for path, change in stored.changes.items():
        name = f"{path}.weight"
        if name not in merged:
            raise ManifestError(f"The adapter at '{stored.place}' changes '{path}', which its base does not have.")
        _check_shape(change, merged[name].shape, path, stored.place)
        merged[name] = Merged(merged[name], change)
    return merged


def _linear(causal: PreTrainedModel, path: str, place: str) -> nn.Linear:
    try:
        module = causal.get_submodule(path)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear):
        raise ManifestError(f"The adapter at '{place}' changes '{path}', which is no linear layer of its base.")
    return module


def _check_shape(change: Change, shape: tuple[int, ...], path: str, place: str) -> None:
    own = (len(change.b), change.a.shape[1])
    if own != shape:
        raise ManifestError(
            f"The adapter at '{place}' does not fit its base: it changes '{path}' of shape {list(own)}, which is "
            f"{list(shape)} there."
        )


# --- out of a model -----------------------------------------------------------------------------------------


def write(tensors: Mapping[str, Tensor], attached: Attached, folder: Path) -> None:
    """Write an adapter as PEFT does. ``tensors`` are by their names in the model, whole."""
    config = replace(attached.config, inference_mode=True, base_model_name_or_path=attached.base.place)
    config.save_pretrained(str(folder))
    named = {f"{PREFIX}{_outside(name)}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named, folder / WEIGHTS, metadata={"format": "pt"})


def _outside(name: str) -> str:
    """A tensor's name in PEFT's files: without the adapter's own name."""
    name = name.replace(f".lora_magnitude_vector.{NAME}.weight", ".lora_magnitude_vector")
    return name.replace(f".{NAME}.", ".")


def _inside(name: str) -> str:
    if name.endswith(".lora_magnitude_vector"):
        return f"{name}.{NAME}.weight"
    path, dot, last = name.rpartition(".")
    return f"{path}.{NAME}{dot}{last}"


class WithoutAdapter:
    """A model with an adapter, run as if it had none: the base, for which no second copy of the weights is needed.

    It is only run forward. What is asked of it otherwise is that of the model.
    """

    only_forward = True

    def __init__(self, model: LanguageModel) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def hidden(self, batch: PackedBatch) -> Tensor:
        """As :meth:`LanguageModel.hidden`."""
        training = self.model.training
        self.model.eval()
        try:
            with switched_off(self.model.causal), torch.no_grad():
                return self.model.hidden(batch)
        finally:
            self.model.train(training)

    def eval(self) -> WithoutAdapter:
        return self

    def train(self, mode: bool = True) -> WithoutAdapter:
        return self

    def make_trainable(self, trained: bool) -> None: ...

    def freeze_heads_except(self, used: Collection[str]) -> None: ...


@contextmanager
def switched_off(causal: nn.Module) -> Iterator[None]:
    """While this is open, a model computes as its base does."""
    layers = [module for module in causal.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
