"""Weighted negative log-likelihood: supervised learning of the tokens that have a weight.

With w_t the weight of token t, x_<t the tokens of its document before it, and N the sum of the weights of the step,

    loss = sum_t  w_t * -log p(x_t | x_<t)  /  N

or, normalised by document, the mean over documents of each one's own weighted mean. No torch is imported here: the
objective only does arithmetic on tensors that it is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from postlude.manifest.component import Component

if TYPE_CHECKING:
    from postlude.data.batch import PackedBatch
    from postlude.objectives.objective import Objective, Outcome, Step


class NegativeLogLikelihood(Component):
    """Negative log-likelihood of the trained tokens."""

    normalize: Literal["token", "document"] = "token"
    """What counts the same: every trained token, or every document."""

    def build(self) -> Objective:
        """The objective."""
        return Likelihood(self.normalize)


class Likelihood:
    """What the component ``nll`` builds (:class:`postlude.objectives.objective.Objective`)."""

    streams: tuple[str, ...] = ()
    statistics: tuple[str, ...] = ()
    heads: Mapping[str, tuple[str, ...]] = {"policy": ("lm",)}

    def __init__(self, normalize: Literal["token", "document"]) -> None:
        self.normalize = normalize

    def count(self, batch: PackedBatch) -> Mapping[str, float]:
        """The sum of the weights, and how many documents have one."""
        total = batch.per_document(batch.weight)
        return {"weight": float(total.double().sum()), "trained_documents": int(total.count_nonzero())}

    def measure(self, step: Step) -> Mapping[str, float]:
        return {}

    def __call__(self, step: Step) -> Outcome:
        from postlude.objectives.objective import Outcome

        batch = step.batch
        rows = batch.trained_rows()
        weights = batch.weight[rows]
        if self.normalize == "token":
            weights = weights / max(step.normalizers["weight"], 1e-30)
        else:
            own = batch.per_document(batch.weight)[batch.document[rows]]
            weights = weights / own / max(step.normalizers["trained_documents"], 1.0)
        loss, each = step.head("lm").negative_log_likelihood(step.hidden()[rows - 1], batch.tokens[rows], weights)
        return Outcome(
            loss=loss,
            example_loss=batch.per_document(each, rows),
            example_tokens=batch.per_document(each.new_ones(len(rows)), rows),
        )
