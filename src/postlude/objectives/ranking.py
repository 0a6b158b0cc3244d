"""Reward models: a number for each answer, so that better answers have larger ones.

A document's score x is what the scalar head makes of the hidden state of its last token. Of the answers of a unit, the
best first, the loss is

- ``bradley_terry``: the mean over its pairs of -log s(x_i - x_j - m), i being the better one, s the logistic function
  and m the margin, the difference of what the data say of the two, or 0 (Bradley and Terry, 1952; Touvron et al.,
  2023). Answers of which the data say the same are no pair.
- ``plackett_luce``: -sum_k log(exp x_k / sum_{j >= k} exp x_j), the probability of the whole order (Plackett, 1975;
  Luce, 1959).

A step's loss is the mean over its units; ``centering`` times the mean of the squared sum of a unit's scores is added,
since only differences are learned otherwise (Eisenstein et al., 2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from postlude.data.batch import PackedBatch
from postlude.data.document import SCORE
from postlude.objectives.answers import once_per_unit
from postlude.objectives.objective import Objective, Outcome, Step

Order = Literal["bradley_terry", "plackett_luce"]


@dataclass(frozen=True)
class Ranking(Objective):
    """The objective over units of two documents or more; the normaliser is ``units``."""

    order: Order = "bradley_terry"
    margins: bool = False
    centering: float = 0.0

    heads = {"policy": ("scalar",)}
    streams = (SCORE.name,)

    def count(self, batch: PackedBatch) -> Mapping[str, float]:
        return {"units": float(batch.units)}

    def __call__(self, step: Step) -> Outcome:
        batch = step.batch
        ends = last_tokens(batch)
        hidden = step.hidden()
        scores = step.head("scalar")(hidden.index_select(0, ends))
        data_scores = batch.streams[SCORE.name][ends]
        unit = batch.unit[: batch.documents]
        better, worse = ordered_pairs(batch, data_scores)
        differences = scores[better] - scores[worse]
        if self.order == "plackett_luce":
            losses = _of_units(batch, unit, _order_losses(batch, scores))
        else:
            margins = data_scores[better] - data_scores[worse] if self.margins else 0.0
            number = _of_units(batch, unit[better], torch.ones_like(differences))
            losses = _of_units(batch, unit[better], -F.logsigmoid(differences - margins)) / number.clamp_min(1)
        if self.centering:
            losses = losses + self.centering * _of_units(batch, unit, scores).square()
        example_loss, example_tokens = once_per_unit(batch, losses)
        # A rank without units takes part in the backward pass.
        loss = losses.sum() / step.normalizers["units"] + 0.0 * hidden.sum() + 0.0 * scores.sum()
        return Outcome(
            loss=loss,
            metrics=_metrics(differences.detach(), scores.detach(), better, worse),
            example_loss=example_loss,
            example_tokens=example_tokens,
        )


def last_tokens(batch: PackedBatch) -> Tensor:
    """[documents] int64: the position of each document's last token."""
    return batch.lengths[: batch.documents].cumsum(0).long() - 1


def ordered_pairs(batch: PackedBatch, data_scores: Tensor) -> tuple[Tensor, Tensor]:
    """[pairs] int64 each: the documents of the better and of the worse answers. ``data_scores`` is [documents].

    Where the data give scores, equal ones make no pair; where they give none, all being zero, the place decides.
    """
    unit, place = batch.unit[: batch.documents], batch.place[: batch.documents]
    before = (unit[:, None] == unit) & (place[:, None] < place)
    scored = torch.zeros(batch.units + 1, device=data_scores.device).index_add(0, unit, data_scores.abs())[unit] > 0
    tied = scored[:, None] & (data_scores[:, None] == data_scores)
    better, worse = (before & ~tied).nonzero(as_tuple=True)
    return better, worse


def _order_losses(batch: PackedBatch, scores: Tensor) -> Tensor:
    """[documents]: -log of the probability that each answer is the best of those that are not before it."""
    unit, place = batch.unit[: batch.documents], batch.place[: batch.documents]
    left = (unit[:, None] == unit) & (place[:, None] <= place)
    among = scores.expand(len(scores), -1).masked_fill(~left, -torch.inf)
    return among.logsumexp(1) - scores if len(scores) else scores


def _of_units(batch: PackedBatch, unit: Tensor, values: Tensor) -> Tensor:
    return values.new_zeros(batch.units).index_add(0, unit, values)


def _metrics(
    differences: Tensor, scores: Tensor, better: Tensor, worse: Tensor
) -> dict[str, tuple[Tensor, Tensor | float]]:
    """Means over pairs. ``confidence`` is the probability that the model gives the answer that it takes for the better
    one: above the accuracy it is too sure. ``brier`` is the squared distance of what it gives the right one from 1
    (Brier, 1950).
    """
    pairs = float(len(differences))
    confident = torch.sigmoid(differences.abs())
    right = torch.sigmoid(differences)
    return {
        "accuracy": ((differences > 0).double().sum(), pairs),
        "margin": (differences.sum(), pairs),
        "chosen_reward": (scores[better].sum(), pairs),
        "rejected_reward": (scores[worse].sum(), pairs),
        "confidence": (confident.sum(), pairs),
        "brier": ((1 - right).square().sum(), pairs),
    }
