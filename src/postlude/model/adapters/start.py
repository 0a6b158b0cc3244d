"""Models with an adapter in them, ready to be trained: in one process, and divided among the ranks of a mesh."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from postlude.manifest.problem import ManifestError
from postlude.model.adapters.inject import check_same, fill, inject, new_config, starting_weights, weights_of
from postlude.model.adapters.merge import changes_of, config_of, read_merged
from postlude.model.adapters.stored import StoredAdapter, StoredModel
from postlude.model.attached import AdapterRequest, Attached, Base
from postlude.model.causal import with_weights_in
from postlude.model.language_model import LanguageModel
from postlude.model.places import absolute, is_adapter_part
from postlude.model.quantized import quantize
from postlude.model.weights import InMemory, LazyTensor, Sources
from postlude.secrecy import stripped


@dataclass(frozen=True)
class Start:
    """The adapter that training begins with: a new one, or one that is continued."""

    request: AdapterRequest
    place: str
    """Of the model that the adapter belongs to."""
    continued: StoredAdapter | None = None

    def inject(
        self, causal: PreTrainedModel, weights: Callable[[list[str]], Mapping[str, LazyTensor]]
    ) -> tuple[Attached, list[str], Mapping[str, Tensor]]:
        """Put the adapter into a model: what is attached, the paths that are adapted, and the adapter's weights by
        name. ``weights`` gives the model's own by such paths."""
        adapter = self.request.adapter
        config: LoraConfig = new_config(adapter, causal) if self.continued is None else self.continued.config
        if self.continued is not None and config.use_dora and adapter.base is not None:
            raise ManifestError(
                f"adapter.base: the adapter at '{self.continued.place}' is a DoRA, which learns from the weights that "
                "'base' packs away. Leave 'base' out."
            )
        if stripped(self.place) != self.place:
            raise ManifestError(
                f"adapter: the model at '{self.place}' is reached with a password or key, and an adapter says in a "
                "file where its base is. Copy the model to where it is read without."
            )
        adapted = inject(causal, config)
        if self.continued is None:
            own: Mapping[str, Tensor] = starting_weights(causal, adapted, self.request.seed, weights(adapted))
        else:
            own = self.continued.named_in_model()
        return Attached(config, Base(absolute(self.place), None)), adapted, own

    def sources(self, causal: PreTrainedModel, sources: Sources) -> tuple[dict[str, LazyTensor], Attached]:
        """Put the adapter into a model without weights, and say where all of its weights come from."""
        attached, adapted, own = self.inject(causal, lambda paths: {path: sources[f"{path}.weight"] for path in paths})
        check_same({name: p for name, p in causal.named_parameters() if is_adapter_part(name)}, own)
        renamed: dict[str, LazyTensor] = {}
        for name, tensor in sources.items():
            path, _, last = name.rpartition(".")
            renamed[f"{path}.base_layer.{last}" if path in adapted else name] = tensor
        return renamed | {name: InMemory(tensor) for name, tensor in own.items()}, attached


def start_of(stored: StoredModel, request: AdapterRequest) -> tuple[StoredModel, Start]:
    """The model that an adapter is put into, and where the adapter begins. ManifestError if one is to be continued
    where there is none."""
    if not request.adapter.continue_:
        return stored, Start(request, stored.place)
    if not stored.adapters:
        raise ManifestError(
            f"adapter.continue: the model at '{stored.place}' is whole, there is no adapter to train on. Leave "
            "'continue' out for a new adapter."
        )
    base, last = replace(stored, adapters=stored.adapters[:-1]), stored.adapters[-1]
    if changes_of(last, config_of(base)) is None:
        raise ManifestError(
            f"adapter.continue: the adapter at '{last.place}' cannot be trained on: it changes more than linear "
            "layers, or does not fit its base. Leave 'continue' out for a new adapter on the model that it makes."
        )
    return base, Start(request, base.place, last)


def load_adapted(stored: StoredModel, config: PreTrainedConfig, request: AdapterRequest) -> LanguageModel:
    """The model in files with an adapter in it: the base frozen, in the dtype that is asked for."""
    base, start = start_of(stored, request)
    causal = read_merged(base, config, "auto")
    stored_dtype = causal.dtype
    model = LanguageModel(with_weights_in(causal, request.frozen_dtype(stored_dtype)), stored_dtype)
    attach(model, start)
    if request.adapter.base is not None:
        quantize(causal, request.adapter.base)
    return model


def attach(model: LanguageModel, start: Start) -> None:
    """Put an adapter into a model that is there."""
    causal = model.causal
    attached, _, own = start.inject(causal, lambda paths: weights_of(causal, paths))
    fill(causal, own)
    model.attached = attached
