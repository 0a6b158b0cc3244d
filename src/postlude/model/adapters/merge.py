"""Adapters merged into their bases: each weight is changed in fp32 and rounded once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from postlude.manifest.problem import ManifestError
from postlude.model.adapters.stored import PREFIX, StoredAdapter, StoredModel
from postlude.model.causal import read_causal
from postlude.model.places import is_adapter_part
from postlude.model.weights import LazyTensor, Region


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

    def check_fits(self, shape: tuple[int, ...], path: str, place: str) -> None:
        """ManifestError if the weight of a module is of another shape."""
        own = (len(self.b), self.a.shape[1])
        if own != shape:
            raise ManifestError(
                f"The adapter at '{place}' does not fit its base: it changes '{path}' of shape {list(own)}, which is "
                f"{list(shape)} there."
            )


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


def read_merged(stored: StoredModel, config: PreTrainedConfig, dtype: torch.dtype | Literal["auto"]) -> PreTrainedModel:
    """A transformers model from its files, with the adapters on it merged into it weight by weight.

    ManifestError if files are broken or incomplete, or an adapter does not fit.
    """
    causal = read_causal(stored.whole_folder, stored.whole_place, config, dtype)
    for adapter in stored.adapters:
        for path, change in _changes(adapter):
            weight = _linear(causal, path, adapter.place).weight
            change.check_fits(tuple(weight.shape), path, adapter.place)
            with torch.no_grad():
                weight.copy_(change.apply(weight))
    return causal


def merge_sources(sources: Mapping[str, LazyTensor], adapter: StoredAdapter) -> dict[str, LazyTensor]:
    """The weights of a base with an adapter merged into them."""
    merged = dict(sources)
    for path, change in _changes(adapter):
        name = f"{path}.weight"
        if name not in merged:
            raise ManifestError(f"The adapter at '{adapter.place}' changes '{path}', which its base does not have.")
        change.check_fits(merged[name].shape, path, adapter.place)
        merged[name] = Merged(merged[name], change)
    return merged


def base_state(
    state: Mapping[str, Tensor], config: LoraConfig, merge: bool, whole: Callable[[Tensor], Tensor] = Tensor.detach
) -> Iterator[tuple[str, Tensor]]:
    """The state of a model with an adapter in it as that of its base, tensor by tensor; to ``merge`` is to make the
    changes in its weights. ``whole`` makes the tensor of which ranks hold parts: all of them go through the same."""
    parts = _parts_by_path(state)
    for name, tensor in state.items():
        if is_adapter_part(name):
            continue
        path, inside, rest = name.partition(".base_layer.")
        gathered = whole(tensor)
        if merge and inside and rest == "weight":
            change = _change({part: whole(value) for part, value in parts[path].items()}, config)
            gathered = change.apply(gathered).to(tensor.dtype)
        yield f"{path}.{rest}" if inside else name, gathered


def _changes(adapter: StoredAdapter) -> Iterator[tuple[str, Change]]:
    """By the path of each module that is adapted."""
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in adapter.tensors.items()}
    for path, parts in _parts_by_path(tensors).items():
        yield path, _change(parts, adapter.config)


def _parts_by_path(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """An adapter's tensors for each module: ``A``, ``B`` and with a DoRA ``magnitude_vector``."""
    by_path: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        path, inside, rest = name.partition(".lora_")
        if inside:
            by_path.setdefault(path, {})[rest.split(".")[0]] = tensor
    return by_path


def _change(parts: Mapping[str, Tensor], config: LoraConfig) -> Change:
    scaling = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    a, b, magnitude = parts["A"].float(), parts["B"].float(), parts.get("magnitude_vector")
    return Change(a, b, scaling, None if magnitude is None else magnitude.float())


def _linear(causal: PreTrainedModel, path: str, place: str) -> nn.Linear:
    try:
        module = causal.get_submodule(path)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear):
        raise ManifestError(f"The adapter at '{place}' changes '{path}', which is no linear layer of its base.")
    return module
