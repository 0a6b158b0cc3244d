"""Log-probabilities of given tokens under a model, packed, without gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from postlude.data.batch import collate
from postlude.data.document import Document, Unit
from postlude.data.packing import best_fit
from postlude.model.language_model import LanguageModel
from postlude.objectives.head import FusedHead


@dataclass(frozen=True)
class Likelihood:
    """How likely the trained tokens of a document are."""

    log_probability: float
    """Weighted and summed over its tokens."""
    weight: float
    """The sum of the weights: the number of tokens where each has the weight 1."""
    tokens: int
    """How many tokens have a weight."""


def packed(documents: Sequence[Document], block: int) -> Iterator[list[int]]:
    """Which documents go through the model together: packs of at most ``block`` tokens, or of one longer document."""
    yield from best_fit([len(document) for document in documents], max([block, *map(len, documents)]))


@torch.no_grad()
def likelihoods(model: LanguageModel, documents: Sequence[Document], block: int) -> list[Likelihood]:
    """The likelihood of each document, ``block`` tokens at a time."""
    made_of = model.lm_head_parameters()
    head = FusedHead(
        made_of.weight,
        made_of.bias,
        vocabulary=made_of.vocabulary,
        scale=made_of.scale,
        soft_cap=made_of.soft_cap,
    )
    found: dict[int, Likelihood] = {}
    for places in packed(documents, block):
        batch = collate([tuple(Unit((documents[place],)) for place in places)]).to(model.device)
        rows = batch.trained_rows()
        hidden = model.hidden(batch)[rows - 1]
        weights = batch.weight[rows]
        _, losses = head.negative_log_likelihood(hidden, batch.tokens[rows], weights)
        sums = batch.per_document(losses.double() * weights, rows)
        measured = batch.per_document(batch.weight.double()), batch.per_document((batch.weight > 0).double())
        for place, loss, weight, tokens in zip(places, sums.tolist(), *(m.tolist() for m in measured), strict=True):
            found[place] = Likelihood(-loss, weight, int(tokens))
    return [found[place] for place in range(len(documents))]
