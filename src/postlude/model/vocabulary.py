"""The vocabulary of a model: how many tokens are real, and the padding that only the inside of it sees.

Matrix products are faster when their sides are multiples of 64, so the embedding and the head get rows up to
the next one. They are zero, the head's softmax leaves them out, and export cuts them off again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from postlude.manifest.problem import ManifestError

MULTIPLE = 64


def padded_size(vocabulary: int) -> int:
    """The next multiple of 64."""
    return -(-vocabulary // MULTIPLE) * MULTIPLE


def rows(causal: PreTrainedModel) -> int:
    """How many rows the embedding of a model has."""
    return len(causal.get_input_embeddings().weight)  # type: ignore[arg-type]


def tokenizer_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest token id that a tokenizer can give."""
    return max(tokenizer.get_vocab().values()) + 1


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocabulary: int, model: str) -> None:
    """ManifestError if the tokenizer gives ids for which the model has no embedding."""
    size = tokenizer_size(tokenizer)
    if size > vocabulary:
        raise ManifestError(
            f"The tokenizer gives ids up to {size - 1}, but the model '{model}' has a vocabulary of {vocabulary} "
            f"tokens (ids up to {vocabulary - 1}). Use the model's own tokenizer, or a model with a vocabulary of at "
            f"least {size}."
        )


def pad(causal: PreTrainedModel) -> None:
    """Pad the vocabulary of a model in place; what is tied stays tied. Its config keeps the real size."""
    size = padded_size(rows(causal))

    def padded(parameter: Tensor) -> Tensor:
        values = parameter.new_zeros(size, *parameter.shape[1:])
        values[: len(parameter)] = parameter
        return values

    if size != rows(causal):
        replace_rows(causal, padded)


def replace_rows(causal: PreTrainedModel, change: Callable[[Tensor], Tensor]) -> None:
    """Give the embedding and the head of a model other rows, in place; what is tied stays tied."""
    embedding: Any = causal.get_input_embeddings()
    head: Any = causal.get_output_embeddings()

    def changed(parameter: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(change(parameter.detach()), requires_grad=parameter.requires_grad)

    tied = head is not None and head.weight is embedding.weight
    embedding.weight = changed(embedding.weight)
    embedding.num_embeddings = len(embedding.weight)
    if head is None:
        return
    head.weight = embedding.weight if tied else changed(head.weight)
    head.out_features = len(head.weight)
    if head.bias is not None:
        head.bias = changed(head.bias)


def unpadded(causal: PreTrainedModel, vocabulary: int) -> dict[str, Tensor]:
    """The model's state by name, with the vocabulary cut to its real size: views, not copies."""
    state = causal.state_dict()
    for module, parameters in (
        (causal.get_input_embeddings(), ("weight",)),
        (causal.get_output_embeddings(), ("weight", "bias")),
    ):
        prefix = next(name for name, candidate in causal.named_modules() if candidate is module)
        for parameter in parameters:
            if f"{prefix}.{parameter}" in state:
                state[f"{prefix}.{parameter}"] = state[f"{prefix}.{parameter}"][:vocabulary]
    return state
