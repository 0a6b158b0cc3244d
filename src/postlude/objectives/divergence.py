"""The divergence of a student from a teacher at each row, through the fused head: [rows, vocabulary] is never held.

With q the student's distribution, both at the temperature T, and h the share of the hard loss, a row's loss is

    (1 - h) T^2 D(teacher, q) + h nll

where nll is the negative log-likelihood of the row's token, at temperature 1, out of the same logits. The factor T^2 is
that of Hinton et al. (2015): the gradient of D by the logits shrinks with it, and the two parts keep their proportion
when T changes. TRL's GKD leaves it out.

With p the teacher's distribution and q the student's, both at the temperature, u the student's logits divided by it and
m = beta p + (1 - beta) q (Agarwal et al., 2023; the meaning of ``beta`` is theirs and TRL's):

- ``forward_kl``: D = sum_j p_j log(p_j / q_j), and its gradient by u is q - p;
- ``reverse_kl``: D = sum_j q_j r_j with r = log(q / p), and the gradient is q (r - D);
- ``jsd``: D = beta KL(p || m) + (1 - beta) KL(q || m), and with s = log(q / m) it is (1 - beta) q (s - KL(q || m)).

A comparison is made in two passes over the tiles of a chunk, because the gradient needs sums over the whole row.
Everything is done in the two buffers that held the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from postlude.objectives.head import FusedHead
from postlude.objectives.logits import ForwardGradients, LogitChunks, Projection, add_at, scaled

Kind = Literal["forward_kl", "reverse_kl", "jsd"]


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


# --- a chunk of rows at a time ------------------------------------------------------------------------------


@dataclass(frozen=True)
class AtPlaces:
    """Values at a few tokens of each row."""

    places: Tensor
    """[rows, n] columns."""
    values: Tensor
    """[rows, n]."""
    logits: Tensor
    """[rows, n] the logits there."""


class Distances(NamedTuple):
    """What the first pass finds out about a chunk of rows."""

    divergence: Tensor
    """[rows, 1]."""
    agrees: Tensor
    """[rows, 1], whether both think the same token the likeliest."""
    apart: AtPlaces | None = None
    """Those of the exponentials that are not among the others: zero stands there."""


class Comparison(Protocol):
    """One chunk of rows at a time: :meth:`measure` first, then :meth:`gradient` for each tile."""

    def measure(self, rows: slice, logits: Tensor, peak: Tensor, tiles: Sequence[slice]) -> Distances:
        """Compare; ``logits`` [rows, vocabulary] become ``exp(logits - peak)`` in place, but for what is set apart."""

    def gradient(self, tile: slice, part: Tensor, share: Tensor) -> None:
        """Make ``share`` [rows, 1] times the gradient of a tile's logits of what :meth:`measure` left there."""

    def gradient_apart(self, share: Tensor) -> AtPlaces | None:
        """The same at the places that were set apart."""


class LiveComparison:
    """With the logits of a teacher, over the first ``shared`` tokens; the student's others take no part."""

    def __init__(self, kind: Kind, beta: float, teacher: LogitChunks, hidden: Tensor, shared: int) -> None:
        self.kind, self.beta, self.shared = kind, beta, shared
        self._teacher, self._hidden = teacher, hidden

    def measure(self, rows: slice, logits: Tensor, peak: Tensor, tiles: Sequence[slice]) -> Distances:
        self._theirs, their_peak = self._teacher.compute(self._hidden[rows].to(self._teacher.product))
        likeliest = self._theirs.argmax(1, keepdim=True)
        agrees = logits.gather(1, likeliest) == peak
        self._total, self._their_total = torch.zeros_like(peak), torch.zeros_like(peak)
        crossed = torch.zeros_like(peak)
        for tile in self._within(tiles):
            ours, theirs = logits[:, tile].sub_(peak), self._theirs[:, tile].sub_(their_peak)
            if self.kind == "forward_kl":
                difference = theirs - ours
                self._their_total += theirs.exp_().sum(1, keepdim=True)
                self._total += ours.exp_().sum(1, keepdim=True)
                crossed += difference.mul_(theirs).sum(1, keepdim=True)
            elif self.kind == "reverse_kl":
                self._their_total += theirs.exp().sum(1, keepdim=True)
                torch.sub(ours, theirs, out=theirs)
                self._total += ours.exp_().sum(1, keepdim=True)
                crossed += (ours * theirs).sum(1, keepdim=True)
            else:
                self._their_total += theirs.exp_().sum(1, keepdim=True)
                self._total += ours.exp_().sum(1, keepdim=True)
        logits[:, self.shared :].sub_(peak).exp_()
        normalizers = self._total.log() - self._their_total.log()
        if self.kind == "forward_kl":
            return Distances(crossed / self._their_total + normalizers, agrees)
        if self.kind == "reverse_kl":
            self._mean = crossed / self._total
            return Distances(self._mean - normalizers, agrees)
        return Distances(self._mixture(logits, tiles), agrees)

    def _mixture(self, logits: Tensor, tiles: Sequence[slice]) -> Tensor:
        """The divergence from the mixture; leaves log(q / m) in the teacher's buffer."""
        tiny = torch.finfo(logits.dtype).tiny
        to_theirs, to_ours = torch.zeros_like(self._total), torch.zeros_like(self._total)
        for tile in self._within(tiles):
            theirs, ours = self._theirs[:, tile].div_(self._their_total), logits[:, tile] / self._total
            mixture = torch.lerp(ours, theirs, self.beta).clamp_min_(tiny)
            to_theirs += (theirs / mixture).clamp_min_(tiny).log_().mul_(theirs).sum(1, keepdim=True)
            torch.div(ours, mixture, out=theirs).clamp_min_(tiny).log_()
            to_ours += ours.mul_(theirs).sum(1, keepdim=True)
        self._mean = to_ours
        return self.beta * to_theirs + (1 - self.beta) * to_ours

    def gradient(self, tile: slice, part: Tensor, share: Tensor) -> None:
        inside = max(0, min(tile.stop, self.shared) - tile.start)
        part[:, inside:] = 0
        ours, theirs = part[:, :inside], self._theirs[:, tile.start : tile.start + inside]
        if self.kind == "forward_kl":
            ours.mul_(share / self._total).addcmul_(theirs, -share / self._their_total)
            return
        factor = share if self.kind == "reverse_kl" else share * (1 - self.beta)
        ours.mul_(theirs.sub_(self._mean)).mul_(factor / self._total)

    def gradient_apart(self, share: Tensor) -> AtPlaces | None:
        return None

    def _within(self, tiles: Sequence[slice]) -> list[slice]:
        return [slice(tile.start, min(tile.stop, self.shared)) for tile in tiles if tile.start < self.shared]


class StoredComparison:
    """With the largest k log-probabilities of a teacher; all other tokens are one outcome, the rest.

    ``ids`` is [rows, k] and ``logp`` [rows, k + 1], the last the logarithm of the rest's mass. What is computed is the
    divergence D' of the k + 1 outcomes, which lumping makes smaller: with p_0 and q_0 the masses of the rest, p' and q'
    the distributions within it, and m_0 = beta p_0 + (1 - beta) q_0, the chain rule gives

    - ``forward_kl``: D - D' = p_0 KL(p' || q'), between 0 and 2 c p_0 where |log(p_j / q_j)| <= c for all tokens j of
      the rest;
    - ``reverse_kl``: D - D' = q_0 KL(q' || p'), between 0 and 2 c q_0;
    - ``jsd``: D - D' = m_0 JSD(p', q') with the weight w = beta p_0 / m_0, between 0 and m_0 h(w), where
      h(w) = -w log w - (1 - w) log(1 - w) <= log 2, whatever the rest holds.

    With k the whole vocabulary there is no rest and the result is exact.
    """

    def __init__(self, kind: Kind, beta: float, ids: Tensor, logp: Tensor) -> None:
        self.kind, self.beta, self._ids, self._logp = kind, beta, ids.long(), logp

    def measure(self, rows: slice, logits: Tensor, peak: Tensor, tiles: Sequence[slice]) -> Distances:
        tiny = torch.finfo(logits.dtype).tiny
        self._places = self._ids[rows]
        self._kept = logits.gather(1, self._places)
        agrees = self._kept[:, :1] == peak
        for tile in tiles:
            logits[:, tile].sub_(peak).exp_()
        kept = (self._kept - peak).exp_()
        # The rest is summed by itself, and keeps a gradient of its own: differences from the kept would be rounding.
        logits.scatter_(1, self._places, 0.0)
        rest = torch.zeros_like(peak)
        for tile in tiles:
            rest += logits[:, tile].sum(1, keepdim=True)
        self._total = rest + kept.sum(1, keepdim=True)
        self._q = torch.cat([kept, rest], 1) / self._total
        p = self._logp[rows].to(self._q).exp()
        log_p, log_q = p.clamp_min(tiny).log(), self._q.clamp_min(tiny).log()
        if self.kind == "forward_kl":
            # The slope by each outcome's probability, -p / q, times that probability is all that is ever needed.
            divergence, self._slope = (p * (log_p - log_q)).sum(1, keepdim=True), -p / self._q.clamp_min(tiny)
        elif self.kind == "reverse_kl":
            divergence, self._slope = (self._q * (log_q - log_p)).sum(1, keepdim=True), log_q - log_p
        else:
            log_m = torch.lerp(self._q, p, self.beta).clamp_min(tiny).log()
            to_theirs = (p * (log_p - log_m)).sum(1, keepdim=True)
            to_ours = (self._q * (log_q - log_m)).sum(1, keepdim=True)
            divergence = self.beta * to_theirs + (1 - self.beta) * to_ours
            self._slope = (1 - self.beta) * (log_q - log_m)
        self._slope = self._slope - (self._q * self._slope).sum(1, keepdim=True)
        return Distances(divergence, agrees, AtPlaces(self._places, kept, self._kept))

    def gradient(self, tile: slice, part: Tensor, share: Tensor) -> None:
        part.mul_(share * self._slope[:, -1:] / self._total)

    def gradient_apart(self, share: Tensor) -> AtPlaces:
        return AtPlaces(self._places, share * self._q[:, :-1] * self._slope[:, :-1], self._kept)


# --- all rows -----------------------------------------------------------------------------------------------


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
