"""Floating-point operations that an architecture needs for a packed batch, whatever the program spends.

Counted are matrix products: two operations for each weight that a token meets, the active experts only; the
pairs of tokens that attend to each other inside their documents; the head on trained rows only. The backward
pass adds a product for the gradient of each trainable weight, and one for the gradient of each input that
depends on a trainable weight. Padding and recomputation are not useful work and not counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from postlude.data.batch import PackedBatch
from postlude.model.anatomy import decoder_of
from postlude.model.language_model import LanguageModel
from postlude.model.places import is_adapter_part


def packed_flops(
    models: Iterable[LanguageModel], headless: Collection[LanguageModel] = ()
) -> Callable[[PackedBatch], float]:
    """A function from a batch to the operations that these models need for it, forward and backward.

    What is frozen is read from ``requires_grad`` now. A model that is frozen altogether is only run forward. Of those
    that are ``headless`` the language head is not used.
    """
    counted = [(ModelFlops(model, getattr(model, "only_forward", False)), model not in headless) for model in models]

    def count(batch: PackedBatch) -> float:
        lengths = batch.lengths[: batch.documents].tolist()
        rows = int(batch.weight.count_nonzero())
        return float(sum(model.count(lengths, rows if has_head else 0) for model, has_head in counted))

    return count


def causal_pairs(length: int, window: int | None) -> int:
    """How many (query, key) pairs there are in a document: each token with itself and those it sees before it."""
    if window is None or window >= length:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window


class ModelFlops:
    """The operations of one model, as a function of document lengths and trained rows."""

    def __init__(self, model: LanguageModel, only_forward: bool = False) -> None:
        layers = model.layers()
        before_layer = [False] * (len(layers) + 1) if only_forward else _trainable_before_layer(model, layers)
        head: Any = model.causal.get_output_embeddings()
        self.per_token = sum(_products_per_token(model, layers, before_layer, only_forward))
        """For each token, attention apart."""
        per_row = 2.0 * model.vocabulary * head.weight.shape[1]
        self.per_row = per_row * (1 + (head.weight.requires_grad and not only_forward) + before_layer[-1])
        """For each row that the language head is applied to."""
        self.per_pair: Counter[int | None] = Counter()
        """By window: for each pair of tokens that attend, summed over the layers with this window."""
        for index, layer in enumerate(model.anatomy.layers):
            backward = before_layer[min(index + 1, len(layers))]
            flops = 2.0 * layer.heads * (layer.key_dim + layer.value_dim)
            self.per_pair[layer.window] += flops * (3 if backward else 1)  # type: ignore[assignment]

    def count(self, lengths: Sequence[int], rows: int) -> float:
        """For documents of these lengths and so many trained rows."""
        attention = sum(
            flops * sum(causal_pairs(length, window) for length in lengths) for window, flops in self.per_pair.items()
        )
        return self.per_token * sum(lengths) + attention + self.per_row * rows


def _trainable_before_layer(model: LanguageModel, layers: Sequence[nn.Module]) -> list[bool]:
    """[layers + 1]: whether anything trainable stands before each decoder layer, and before the head."""
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    decoder = decoder_of(model.causal)
    is_trained = any(parameter.requires_grad for parameter in _embeddings(decoder))
    before = [is_trained]
    for layer in layers:
        is_trained = is_trained or any(parameter.requires_grad for parameter in layer.parameters())
        before.append(is_trained)
    after = (p for p in decoder.parameters() if id(p) not in inside)
    before[-1] = is_trained or any(parameter.requires_grad for parameter in after)
    return before


def _products_per_token(
    model: LanguageModel, layers: Sequence[nn.Module], before_layer: Sequence[bool], only_forward: bool = False
) -> Iterator[float]:
    """For each weight of the decoder's matrix products, its operations for one token, backward pass included.

    Norms stand before the products of their layer, wherever they are registered.
    """
    decoder = decoder_of(model.causal)
    owner = {id(parameter): index for index, layer in enumerate(layers) for parameter in layer.parameters()}
    embeddings = {id(parameter) for parameter in _embeddings(decoder)}
    started = [any(p.requires_grad and p.ndim == 1 for p in layer.parameters()) for layer in layers]
    for name, parameter in decoder.named_parameters():
        if id(parameter) in embeddings or parameter.ndim < 2 or "bias" in name.rpartition(".")[2]:
            continue
        if only_forward:
            if not is_adapter_part(name):
                yield 2.0 * parameter.numel() * (_active_share(model, parameter) if parameter.ndim == 3 else 1.0)
            continue
        layer = owner.get(id(parameter))
        for_input = before_layer[-1] if layer is None else before_layer[layer] or started[layer]
        active = _active_share(model, parameter) if parameter.ndim == 3 else 1.0
        yield 2.0 * parameter.numel() * active * (1 + for_input + parameter.requires_grad)
        if layer is not None:
            started[layer] = started[layer] or parameter.requires_grad


def _embeddings(decoder: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that are looked up, not multiplied."""
    for module in decoder.modules():
        if isinstance(module, nn.Embedding):
            yield from module.parameters()


def _active_share(model: LanguageModel, experts: nn.Parameter) -> float:
    """The share of a stack of experts [experts, in, out] that one token meets."""
    config = model.config.get_text_config()
    for key in ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k"):
        chosen = getattr(config, key, None)
        if isinstance(chosen, int):
            return min(1.0, chosen / experts.shape[0])
    return 1.0
