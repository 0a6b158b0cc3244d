"""The divergence of a student from a teacher at each row, through the fused head: [rows, vocabulary] is never held.

With q the student's distribution, both at the temperature T, and h the share of the hard loss, a row's loss is

    (1 - h) T^2 D(teacher, q) + h nll

where nll is the negative log-likelihood of the row's token, at temperature 1, out of the same logits. The factor T^2 is
that of Hinton et al. (2015): the gradient of D by the logits shrinks with it, and the two parts keep their proportion
when T changes. TRL's GKD leaves it out. For D see :mod:`postlude.objectives.comparison`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from postlude.objectives.comparison import AtPlaces, Comparison, Kind, LiveComparison, StoredComparison
from postlude.objectives.head import FusedHead
from postlude.objectives.logits import ForwardGradients, LogitChunks, Projection, add_at, scaled


@dataclass(frozen=True)
class Measure:
    """Which divergence, and what is mixed into it."""

    kind: Kind = "forward_kl"
    beta: float = 0.5
    """The teacher's share in the mixture of ``jsd``, between 0 and 1."""
    temperature: float = 1.0
    hard_loss: float = 0.0
    """The share of the negative log-likelihood, from 0 to below 1."""


@dataclass(frozen=True)
class LiveTeacher:
    """A teacher that is run with the student."""

    head: FusedHead
    hidden: Tensor
    """[rows, hidden], of the teacher's own width."""


@dataclass(frozen=True)
class StoredTeacher:
    """What a teacher said before, of the tokens that it thought likeliest, at the temperature of the measure."""

    ids: Tensor
    """[rows, k] the tokens, the likeliest first."""
    logp: Tensor
    """[rows, k + 1] their log-probabilities, and last that of all other tokens together."""


class Divergences(NamedTuple):
    """What was measured at each row, [rows] each, detached."""

    loss: Tensor
    divergence: Tensor
    """D, without the factor of the temperature."""
    agrees: Tensor
    """1 where both think the same token the likeliest."""
    likelihood: Tensor | None
    """The negative log-likelihood; None where it would cost something and has no share in the loss."""


def divergence(
    head: FusedHead,
    hidden: Tensor,
    targets: Tensor,
    weights: Tensor,
    teacher: LiveTeacher | StoredTeacher,
    measure: Measure,
) -> tuple[Tensor, Divergences]:
    """The weighted sum of the rows' losses of distillation, a scalar to differentiate, and what each row has, detached.

    As :meth:`FusedHead.negative_log_likelihood`, with the same promise: weights that need a gradient are a ValueError.
    A live teacher's vocabulary may be larger or smaller: the distributions are those over the tokens that both have.
    """
    if weights.requires_grad:
        raise ValueError("The weights of the rows of a divergence are known beforehand: they need no gradient.")
    head = head.whole()
    if isinstance(teacher, LiveTeacher):
        teacher = replace(teacher, head=teacher.head.whole())
    # A live teacher's logits take a buffer of their own: together they are as large as the one of the likelihood.
    halved = replace(head.limits, chunk_bytes=head.limits.chunk_bytes // 2)
    limits = halved if isinstance(teacher, LiveTeacher) else head.limits
    projection = replace(head.projection(hidden, measure.temperature), limits=limits)
    with_likelihood = measure.hard_loss > 0 or measure.temperature == 1
    columns = head.vocabulary
    if isinstance(teacher, LiveTeacher) and not with_likelihood:
        columns = min(columns, teacher.head.vocabulary)
    theirs = teacher.head.projection(teacher.hidden, measure.temperature) if isinstance(teacher, LiveTeacher) else None
    task = _Task(head, projection, theirs, columns, targets, weights, teacher, measure, with_likelihood)
    with torch.autocast(hidden.device.type, enabled=False):
        loss, *rows = _Divergence.apply(hidden, head.weight, head.bias, task, torch.is_grad_enabled())
    return loss, Divergences(*rows)


@dataclass(frozen=True)
class _Task:
    head: FusedHead
    projection: Projection
    theirs: Projection | None
    """How a live teacher's logits are made."""
    columns: int
    """How many of the student's logits are computed."""
    targets: Tensor
    weights: Tensor
    teacher: LiveTeacher | StoredTeacher
    measure: Measure
    with_likelihood: bool

    def comparison(self, chunks: LogitChunks) -> Comparison:
        measure, teacher = self.measure, self.teacher
        if isinstance(teacher, StoredTeacher) or self.theirs is None:
            assert isinstance(teacher, StoredTeacher)
            return StoredComparison(measure.kind, measure.beta, teacher.ids, teacher.logp)
        shared = min(self.columns, teacher.head.vocabulary)
        # As many rows in a chunk as the student has, whatever the limits make of the teacher's vocabulary.
        size = max((chunk.stop - chunk.start for chunk in chunks.chunks), default=1)
        row_bytes = len(teacher.head.weight) * 8
        limits = replace(self.projection.limits, chunk_rows=size, chunk_bytes=size * row_bytes)
        logits = teacher.head.chunks(replace(self.theirs, limits=limits), size, shared)
        return LiveComparison(measure.kind, measure.beta, logits, teacher.hidden.detach(), shared)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, task: _Task, with_gradient: bool
    ) -> tuple[Tensor | None, ...]:
        temperature, share = task.measure.temperature, task.measure.hard_loss
        chunks = task.head.chunks(task.projection, len(hidden), task.columns)
        weights = task.weights.to(chunks.sum)
        compared = task.comparison(chunks)
        gradients = ForwardGradients(ctx, (hidden, weight, bias), weights, chunks, task.head.upstream, with_gradient)
        distance, agrees = torch.empty_like(weights), torch.empty_like(weights)
        likelihood = torch.empty_like(weights) if task.with_likelihood else None
        for rows in chunks.chunks:
            own, target = hidden[rows].to(chunks.product), task.targets[rows].unsqueeze(1)
            logits, peak = chunks.compute(own)
            at_target = logits.gather(1, target) if likelihood is not None else None
            distances = compared.measure(rows, logits, peak, chunks.tiles)
            distance[rows], agrees[rows] = distances.divergence.squeeze(1), distances.agrees.squeeze(1).to(agrees)
            total = torch.zeros_like(peak)
            if likelihood is not None and at_target is not None:
                for tile in chunks.tiles:
                    total += _at_temperature_one(logits[:, tile], temperature).sum(1, keepdim=True)
                if distances.apart is not None:
                    total += _at_temperature_one(distances.apart.values, temperature).sum(1, keepdim=True)
                likelihood[rows] = (total.log() + temperature * (peak - at_target)).squeeze(1)
            if not gradients.wanted:
                continue
            of_row = (weights[rows] / gradients.power).unsqueeze(1)
            soft, hard = of_row * ((1 - share) * temperature**2), of_row * (share * temperature)
            for tile in chunks.tiles:
                part = logits[:, tile]
                slope = _slope(chunks, part, peak)
                likely = _at_temperature_one(part, temperature) * (hard / total) if share else None
                compared.gradient(tile, part, soft)
                if likely is not None:
                    part.add_(likely)
                if slope is not None:
                    part.mul_(slope)
            apart = [compared.gradient_apart(soft)]
            if share and distances.apart is not None:
                likely = _at_temperature_one(distances.apart.values, temperature) * (hard / total)
                apart.append(replace(distances.apart, values=likely))
            if share and at_target is not None:
                apart.append(AtPlaces(target, -hard, at_target))
            for places in filter(None, apart):
                add_at(places.places, logits, places.values, chunks.slope(places.logits))
            for tile in chunks.tiles:
                gradients.add(rows, own, tile, logits[:, tile])
        gradients.keep(ctx)
        loss = distance * ((1 - share) * temperature**2)
        if share and likelihood is not None:
            loss = loss + share * likelihood
        total_loss = (weights * loss).sum()
        ctx.mark_non_differentiable(*(t for t in (loss, distance, agrees, likelihood) if t is not None))
        return total_loss, loss, distance, agrees, likelihood

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return (*scaled(ctx, upstream), None, None)


def _at_temperature_one(likely: Tensor, temperature: float) -> Tensor:
    """exp(z - max z) out of exp(u - max u), where the logits z are u times the temperature."""
    return likely if temperature == 1 else likely.pow(temperature)


def _slope(chunks: LogitChunks, likely: Tensor, peak: Tensor) -> Tensor | None:
    """The slope of a soft cap where the logits have become exp(logits - peak)."""
    if chunks.projection.soft_cap is None:
        return None
    # What has vanished below has no gradient either, so that its slope does not matter.
    return chunks.slope(likely.clamp_min(torch.finfo(likely.dtype).tiny).log_().add_(peak))
