"""Adapters merged into their bases: each weight is changed in fp32 and rounded once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from postlude.manifest.problem import ManifestError
from postlude.model.adapters.foreign import config_with, merge_by_peft
from postlude.model.adapters.inject import inject
from postlude.model.adapters.stored import StoredAdapter, StoredModel
from postlude.model.causal import read_causal, weightless
from postlude.model.places import is_adapter_part, one_line
from postlude.model.weights import InMemory, LazyTensor, Region


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


def config_of(stored: StoredModel) -> PreTrainedConfig:
    """The configuration of a model with the adapters on it merged into it."""
    config = stored.base_config()
    for adapter in stored.adapters:
        config = config_with(adapter, config)
    return config


def read_merged(stored: StoredModel, config: PreTrainedConfig, dtype: torch.dtype | Literal["auto"]) -> PreTrainedModel:
    """A transformers model from its files, with the adapters on it merged into it weight by weight. ``config`` is that
    of the merged model.

    ManifestError if files are broken or incomplete, or an adapter does not fit.
    """
    whole = config if all(adapter.is_plain for adapter in stored.adapters) else stored.base_config()
    causal = read_causal(stored.whole_folder, stored.whole_place, whole, dtype)
    for adapter in stored.adapters:
        changes = changes_of(adapter, causal.config)
        if changes is None:
            causal = merge_by_peft(causal, adapter)
            continue
        for path, change in changes.items():
            weight = causal.get_submodule(path).weight
            with torch.no_grad():
                weight.copy_(change.apply(weight))  # type: ignore[operator, arg-type]
    return causal


def merged_sources(
    sources: Mapping[str, LazyTensor], stored: StoredModel, config: PreTrainedConfig
) -> dict[str, LazyTensor]:
    """The weights of a base with the adapters on it merged into them, each when it is read; all at once, in memory,
    where that needs the whole model. ``config`` is that of the merged model."""
    merged = dict(sources)
    for adapter in stored.adapters:
        changes = changes_of(adapter, config)
        if changes is None:
            whole = read_merged(stored, config, "auto")
            return {name: InMemory(tensor.detach()) for name, tensor in whole.state_dict().items()}
        for path, change in changes.items():
            merged[f"{path}.weight"] = Merged(merged[f"{path}.weight"], change)
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
            change = _change(path, {part: whole(value) for part, value in parts[path].items()}, config)
            gathered = change.apply(gathered).to(tensor.dtype)
        yield f"{path}.{rest}" if inside else name, gathered


def changes_of(adapter: StoredAdapter, config: PreTrainedConfig) -> dict[str, Change] | None:
    """What a plain adapter makes of each weight, by the path of the module; None for one that only PEFT can merge, or
    whose tensors are not named as the layers that PEFT puts into a model of this configuration."""
    if not adapter.is_plain or config_with(adapter, config) is not config:
        return None
    causal = weightless(config)
    try:
        adapted = inject(causal, adapter.config)
    except ValueError as error:
        raise ManifestError(f"The adapter at '{adapter.place}' does not fit its base: {one_line(error)}") from error
    named = adapter.named_in_model()
    own = {name: parameter for name, parameter in causal.named_parameters() if is_adapter_part(name)}
    layers = [causal.get_submodule(path) for path in adapted]
    if not all(isinstance(layer.base_layer, nn.Linear) for layer in layers):
        return None
    if {name: tensor.shape for name, tensor in named.items()} != {name: tensor.shape for name, tensor in own.items()}:
        return None
    return {path: _change(path, parts, adapter.config) for path, parts in _parts_by_path(named).items()}


def _parts_by_path(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """An adapter's tensors for each module: ``A``, ``B`` and with a DoRA ``magnitude_vector``."""
    by_path: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        path, inside, rest = name.partition(".lora_")
        if inside:
            by_path.setdefault(path, {})[rest.split(".")[0]] = tensor
    return by_path


def _change(path: str, parts: Mapping[str, Tensor], config: LoraConfig) -> Change:
    a, b, magnitude = parts["A"].float(), parts["B"].float(), parts.get("magnitude_vector")
    alphas = config.alpha_pattern or {}
    alpha = alphas.get(get_pattern_key(list(alphas), path), config.lora_alpha)
    scaling = alpha / (math.sqrt(len(a)) if config.use_rslora else len(a))
    return Change(a, b, scaling, None if magnitude is None else magnitude.float())
