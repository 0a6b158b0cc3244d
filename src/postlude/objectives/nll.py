"""Weighted negative log-likelihood: the loss of language modelling and of supervised fine-tuning.

Where w_t is the weight of token t (0 where it is not trained), the loss of a step is

- ``token``:     sum_t w_t nll_t / sum_t w_t, over all its tokens;
- ``document``:  the same for each document by itself, then the mean over those with a trained token, so that a
  short answer counts as much as a long one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from postlude.objectives.objective import Objective, ObjectiveConfig, Outcome

if TYPE_CHECKING:
    from torch import Tensor

    from postlude.data.batch import PackedBatch
    from postlude.objectives.objective import Step

Normalizer = Literal["token", "document"]


class NegativeLogLikelihood(ObjectiveConfig):
    """Weighted negative log-likelihood."""

    normalize: Normalizer = "token"
    """What counts the same: each trained token (times its weight), or each document."""

    def build(self) -> WeightedLikelihood:
        return WeightedLikelihood(self.normalize)


@dataclass(frozen=True)
class WeightedLikelihood(Objective):
    """The objective; normalisers are ``trained_weight`` or ``trained_documents``."""

    normalize: Normalizer = "token"
    streams = ()
    heads = {"policy": ("lm",)}
    loss_is_likelihood = True

    def count(self, batch: PackedBatch) -> Mapping[str, float]:
        if self.normalize == "token":
            return {"trained_weight": float(batch.weight.double().sum())}
        return {"trained_documents": float((batch.per_document(batch.weight) > 0).sum())}

    def weights(self, step: Step, rows: Tensor) -> Tensor:
        """How much each of the trained ``rows`` counts in the loss of the whole step, [rows]."""
        weights = step.batch.weight[rows]
        if self.normalize == "token":
            return weights / step.normalizers["trained_weight"]
        of_document = step.batch.per_document(weights, rows)[step.batch.document[rows]]
        return weights / of_document / step.normalizers["trained_documents"]

    def __call__(self, step: Step) -> Outcome:
        batch = step.batch
        rows = batch.trained_rows()
        weights = self.weights(step, rows)
        before = step.hidden().index_select(0, rows - 1)
        loss, likelihood = step.head("lm").negative_log_likelihood(before, batch.tokens[rows], weights)
        return Outcome(
            loss=loss,
            example_loss=batch.per_document(likelihood, rows),
            example_tokens=batch.per_document(rows.new_ones(rows.shape), rows),
        )
