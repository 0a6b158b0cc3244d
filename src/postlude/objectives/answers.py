"""What objectives over answers have in common: the log-probability of each document's trained tokens.

A unit holds the answers to one prompt; in a pair the document in place 0 is the chosen answer, the other the rejected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from postlude.data.batch import PackedBatch
from postlude.data.document import REFERENCE_LOGP
from postlude.objectives.objective import Step


@dataclass(frozen=True)
class Likelihood:
    """Log-probabilities of a batch's trained tokens."""

    rows: Tensor
    """[trained] int64: their positions."""
    tokens: Tensor
    """[trained]: each one's log-probability."""
    documents: Tensor
    """[documents]: their sum in each document."""


def likelihood(step: Step, model: str = "policy") -> Likelihood:
    """The log-probabilities under a model of the step; differentiable where the model is trained."""
    batch = step.batch
    rows = batch.trained_rows()
    before = step.hidden(model).index_select(0, rows - 1)
    tokens, _ = step.head("lm", model).log_probabilities(before, batch.tokens[rows])
    return Likelihood(rows, tokens, batch.per_document(tokens, rows))


def reference_likelihood(step: Step, stored: bool) -> Likelihood:
    """Those under the frozen reference: as the documents bring them, or of the model ``reference``. No gradient."""
    if not stored:
        with torch.no_grad():
            return likelihood(step, "reference")
    batch = step.batch
    rows = batch.trained_rows()
    tokens = batch.streams[REFERENCE_LOGP.name][rows]
    return Likelihood(rows, tokens, batch.per_document(tokens, rows))


def trained_counts(batch: PackedBatch) -> Tensor:
    """[documents] float32: how many tokens of each document are trained."""
    rows = batch.trained_rows()
    return batch.per_document(torch.ones_like(rows, dtype=torch.float32), rows)


def sides(batch: PackedBatch, values: Tensor) -> tuple[Tensor, Tensor]:
    """[pairs] each: what [documents] holds for the chosen and for the rejected answers, in the order of units."""
    place = batch.place[: batch.documents]
    return values[place == 0], values[place == 1]


def once_per_unit(batch: PackedBatch, losses: Tensor) -> tuple[Tensor, Tensor]:
    """Losses of units [units] as losses of documents, and how many tokens they run over: [documents] each.

    The first document stands for its unit; the others have no tokens, and so no row among the losses by example.
    """
    unit, place = batch.unit[: batch.documents], batch.place[: batch.documents]
    tokens = losses.new_zeros(batch.units).index_add(0, unit, trained_counts(batch))
    first = place == 0
    return torch.where(first, losses.detach()[unit], 0.0), torch.where(first, tokens[unit], 0.0)


def divergence(policy: Sequence[Likelihood], reference: Sequence[Likelihood]) -> tuple[Tensor, float]:
    """How far the policy is from the reference on the data's own tokens: numerator and denominator of a mean.

    Of each token r - 1 - log r with r = p_reference / p_policy (Schulman, 2020), which is never negative.
    """
    ratios = [(theirs.tokens - ours.tokens).detach() for ours, theirs in zip(policy, reference, strict=True)]
    return torch.stack([(r.exp() - 1 - r).sum() for r in ratios]).sum(), float(sum(len(r) for r in ratios))
