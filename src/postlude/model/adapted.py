"""Models with an adapter in them, ready to be trained: in one process, and divided among the ranks of a mesh."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from postlude.manifest.problem import ManifestError
from postlude.model import adapters, quantized
from postlude.model.adapters import Asked, Attached, Base, StoredAdapter
from postlude.model.language_model import LanguageModel
from postlude.model.load import read_causal, with_weights_in
from postlude.model.weights import InMemory, LazyTensor


@dataclass(frozen=True)
class Start:
    """What training begins with: a base, and an adapter on it, if it is not a new one."""

    folder: str
    place: str
    stored: StoredAdapter | None

    def config(self, asked: Asked, causal: PreTrainedModel) -> LoraConfig:
        return adapters.new_config(asked.adapter, causal) if self.stored is None else self.stored.config


@contextmanager
def start_of(folder: str, place: str, asked: Asked) -> Iterator[Start]:
    """Where an adapter begins. ManifestError if one shall be continued where there is none."""
    if not asked.adapter.continue_:
        yield Start(folder, place, None)
        return
    if not adapters.is_adapter(folder):
        raise ManifestError(
            f"adapter.continue: the model at '{place}' is whole, there is no adapter to train on. Leave 'continue' out "
            "for a new adapter."
        )
    stored = StoredAdapter(folder, place)
    with stored.base_folder() as base:
        yield Start(base, stored.base.place, stored)


def load_adapted(folder: str, place: str, config: PreTrainedConfig, asked: Asked) -> LanguageModel:
    """The model in a local folder with an adapter in it: the base frozen, in the dtype that is asked for."""
    with start_of(folder, place, asked) as start:
        causal = read_causal(start.folder, start.place, config, "auto")
        stored_dtype = causal.dtype
        model = LanguageModel(with_weights_in(causal, asked.hold(stored_dtype)), stored_dtype)
        lora = start.config(asked, causal)
        if lora.use_dora and asked.adapter.base is not None:
            raise ManifestError(
                f"adapter.base: the adapter at '{place}' is a DoRA, which learns from the weights that 'base' packs "
                "away. Leave 'base' out."
            )
        adapted = adapters.inject(causal, lora)
        adapters.fill(causal, _weights(start, causal, adapted, asked, adapters.weights_of(causal, adapted)))
        if asked.adapter.base is not None:
            quantized.hold(causal, asked.adapter.base)
    model.attached = Attached(lora, Base(start.place, None))
    return model


def attach_new(model: LanguageModel, asked: Asked, place: str) -> None:
    """Put a new adapter into a model that is there."""
    start = Start("", place, None)
    lora = start.config(asked, model.causal)
    adapted = adapters.inject(model.causal, lora)
    weights = adapters.weights_of(model.causal, adapted)
    adapters.fill(model.causal, _weights(start, model.causal, adapted, asked, weights))
    model.attached = Attached(lora, Base(place, None))


def sources_with_adapter(
    start: Start, causal: PreTrainedModel, found: Mapping[str, LazyTensor], asked: Asked
) -> tuple[dict[str, LazyTensor], Attached]:
    """Put an adapter into a model without weights, and say where all of its weights come from."""
    lora = start.config(asked, causal)
    adapted = adapters.inject(causal, lora)
    weights = {path: found[f"{path}.weight"] for path in adapted}
    own = _weights(start, causal, adapted, asked, weights)
    adapters.check_same({name: p for name, p in causal.named_parameters() if adapters.is_adapter_part(name)}, own)
    inside = set(adapted)
    sources: dict[str, LazyTensor] = {}
    for name, tensor in found.items():
        path, _, last = name.rpartition(".")
        sources[f"{path}.base_layer.{last}" if path in inside else name] = tensor
    sources |= {name: InMemory(tensor) for name, tensor in own.items()}
    return sources, Attached(lora, Base(start.place, None))


def _weights(
    start: Start, causal: PreTrainedModel, adapted: list[str], asked: Asked, weights: Mapping[str, LazyTensor]
) -> Mapping[str, Tensor]:
    if start.stored is not None:
        return start.stored.inside()
    return adapters.starting_weights(causal, adapted, asked.seed, weights)
