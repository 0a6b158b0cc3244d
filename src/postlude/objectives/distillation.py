"""Distillation: the student's distribution at each trained token is drawn towards a teacher's (Hinton et al., 2015).

The teacher runs beside the student, or has said beforehand which tokens it finds likeliest: then its ``top_k`` tokens
come as streams, and all the others count as one outcome. For what a row's loss is see
:mod:`postlude.objectives.divergence`; rows are weighted and normalised as those of the likelihood are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from postlude.data.batch import PackedBatch
from postlude.data.document import define_stream
from postlude.objectives.divergence import LiveTeacher, Measure, StoredTeacher, divergence
from postlude.objectives.nll import WeightedLikelihood
from postlude.objectives.objective import Objective, Outcome, Step


def top_streams(k: int) -> tuple[str, str]:
    """The names of the streams that hold what a teacher finds likeliest: ids [k], and log-probabilities [k + 1]."""
    ids = define_stream(f"top_{k}_ids", "int32", width=(k,))
    logp = define_stream(f"top_{k}_logp", "float32", width=(k + 1,))
    return ids.name, logp.name


@dataclass(frozen=True)
class Distillation(Objective):
    """The objective. ``top_k`` is the number of stored tokens, None for the model ``teacher`` that runs along."""

    divergence: Measure
    weighting: WeightedLikelihood
    top_k: int | None = None
    loss_is_likelihood = True

    @property
    def streams(self) -> tuple[str, ...]:
        return () if self.top_k is None else top_streams(self.top_k)

    @property
    def heads(self) -> Mapping[str, tuple[str, ...]]:
        return {"policy": ("lm",)} if self.top_k else {"policy": ("lm",), "teacher": ("lm",)}

    def count(self, batch: PackedBatch) -> Mapping[str, float]:
        return self.weighting.count(batch)

    def __call__(self, step: Step) -> Outcome:
        batch = step.batch
        rows = batch.trained_rows()
        weights = self.weighting.weights(step, rows)
        before = step.hidden().index_select(0, rows - 1)
        teacher = self._teacher(step, rows)
        loss, divergences = divergence(step.head("lm"), before, batch.tokens[rows], weights, teacher, self.divergence)
        trained = float(len(rows))
        metrics = {
            "divergence": (divergences.divergence.sum(), trained),
            "agreement": (divergences.agrees.sum(), trained),
        }
        if divergences.likelihood is not None:
            metrics["hard_loss"] = (divergences.likelihood.sum(), trained)
        return Outcome(
            loss=loss,
            metrics=metrics,
            example_loss=batch.per_document(divergences.loss, rows),
            example_tokens=batch.per_document(rows.new_ones(rows.shape), rows),
        )

    def _teacher(self, step: Step, rows: Tensor) -> LiveTeacher | StoredTeacher:
        if self.top_k is not None:
            ids, logp = (step.batch.streams[name][rows] for name in self.streams)
            return StoredTeacher(ids, logp)
        return LiveTeacher(step.head("lm", "teacher"), step.hidden("teacher").index_select(0, rows - 1))
