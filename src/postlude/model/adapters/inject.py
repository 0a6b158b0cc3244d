"""Adapters put into a model: which layers, what they begin with, and the model run without them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from postlude.data.batch import PackedBatch
from postlude.manifest.adapter import Adapter
from postlude.manifest.problem import ManifestError
from postlude.model.anatomy import linear_layers, name_of
from postlude.model.attached import ADAPTER_NAME
from postlude.model.language_model import LanguageModel
from postlude.model.places import is_adapter_part
from postlude.model.weights import InMemory, LazyTensor, read_whole


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
    chosen: set[str] = set()
    for target in adapter.targets or [name for name, members in groups.items() if members]:
        members = groups.get(target) or [path for path in paths if path == target or path.endswith(f".{target}")]
        if not members:
            ends = sorted({path.rpartition(".")[2] for path in paths})
            raise ManifestError(
                f"adapter.targets: '{target}' is no linear layer of the architecture '{name_of(causal)}'. Choose among "
                f"{', '.join([*(name for name, members in groups.items() if members), *ends])}. Experts that are one "
                "tensor, embeddings and the head cannot be adapted."
            )
        chosen.update(members)
    return sorted(chosen)


def _shortest(paths: list[str], causal: PreTrainedModel) -> list[str]:
    """The last parts of the paths, where these mean the same modules; PEFT understands both."""
    ends = sorted({path.rpartition(".")[2] for path in paths})
    meant = {path for path, _ in causal.named_modules() if path.rpartition(".")[2] in ends}
    return ends if meant == set(paths) else paths


def inject(causal: PreTrainedModel, config: LoraConfig) -> list[str]:
    """Put an adapter's layers in; its weights are empty where those of the model are. The paths that are adapted."""
    meta = next(causal.parameters()).is_meta
    with torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(replace(config, inference_mode=False), causal, ADAPTER_NAME, low_cpu_mem_usage=meta)
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
    starting: dict[str, Tensor] = {}
    for path in adapted:
        module: Any = causal.get_submodule(path)
        rank, width = module.lora_A[ADAPTER_NAME].weight.shape
        number = int.from_bytes(hashlib.blake2b(f"{seed} {path}".encode(), digest_size=8).digest()) >> 1
        uniform = torch.rand(rank, width, generator=torch.Generator().manual_seed(number)) * 2 - 1
        starting[f"{path}.lora_A.{ADAPTER_NAME}.weight"] = uniform / math.sqrt(width)
        starting[f"{path}.lora_B.{ADAPTER_NAME}.weight"] = torch.zeros(module.out_features, rank)
        if ADAPTER_NAME in module.lora_magnitude_vector:
            lengths = torch.linalg.norm(read_whole(weights[path]).float(), dim=1)
            starting[f"{path}.lora_magnitude_vector.{ADAPTER_NAME}.weight"] = lengths
    return starting


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
        shapes = [tuple(tensors[name].shape) if name in tensors else None for tensors in (own, weights)]
        if shapes[0] != shapes[1]:
            raise ManifestError(
                f"The adapter does not fit its base: '{name}' is {shapes[1] or 'missing'} in its files, and "
                f"{shapes[0] or 'missing'} in the model."
            )


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
