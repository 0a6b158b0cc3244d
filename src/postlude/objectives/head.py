"""The fused language-model head: from hidden states to losses without ever holding [rows, vocabulary].

Notable:

- Two paths. Where the weight of every row is known beforehand, the gradient is made during the forward pass, as
  soon as a chunk's logits are there: three products in all. Where it is not (a preference loss, a policy ratio),
  the backward pass computes the logits again: four.
- The caller drops the rows that are not trained; nothing is spent on them.
- Where ranks have a part of the vocabulary each, they exchange three numbers for each row, never logits.
- A gradient is made only for what needs one: not for a frozen head, not for the hidden states of a frozen model.
- On request the weight's gradient goes into ``weight.grad`` at once, on either path: however many micro-batches a
  step has, a second gradient of the size of the vocabulary is never allocated.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from postlude.model.tensor_parallel import VocabularyPart, gather
from postlude.objectives.logits import (
    ForwardGradients,
    Gradients,
    Limits,
    LogitChunks,
    Projection,
    SharedSoftmax,
    Softmax,
    product_dtype,
    rounded,
    scaled,
)


class FusedHead:
    """The head ``lm`` (:class:`postlude.objectives.objective.LanguageHead`).

    ``weight`` is [rows, hidden] and ``bias`` [rows] or None. The first ``vocabulary`` rows are real; the rest are
    padding, which takes no part in the softmax and gets a gradient of exactly zero. The logits are
    ``soft_cap * tanh(scale * (hidden @ weight.T + bias) / soft_cap)``.

    ``upstream`` is a promise: the sum that :meth:`negative_log_likelihood` returns enters what is differentiated
    with exactly this factor (a loss scale, or 1). The forward pass then adds the gradient of a weight that is a leaf
    in fp32 to ``weight.grad`` itself, so that all micro-batches share the one. In exchange each forward pass that
    builds a graph must be followed by its backward pass, which raises RuntimeError if the factor is another, and
    hooks on the weight do not see this gradient.

    ``in_place`` does the same for the backward pass of :meth:`log_probabilities`, where nothing need be promised.

    With a ``part``, ``weight`` and ``bias`` are this rank's rows of the head, and all ranks call with the same hidden
    states. :func:`postlude.objectives.divergence.divergence` and :meth:`top_log_probabilities` then gather the rows of
    all.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        vocabulary: int | None = None,
        scale: float = 1.0,
        soft_cap: float | None = None,
        upstream: float | None = None,
        in_place: bool = False,
        limits: Limits | None = None,
        part: VocabularyPart | None = None,
    ) -> None:
        self.weight, self.bias, self.part = weight, bias, part
        self.softmax = Softmax() if part is None else SharedSoftmax(part)
        self.vocabulary = len(weight) if vocabulary is None else vocabulary
        self.scale, self.soft_cap, self.upstream, self.in_place = scale, soft_cap, upstream, in_place
        self.limits = limits or Limits.of(weight.device)
        if self.vocabulary < 1 or (part is None and self.vocabulary > len(weight)):
            raise ValueError(f"A head of {len(weight)} rows cannot serve a vocabulary of {vocabulary}.")

    def negative_log_likelihood(self, hidden: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted sum of the rows' negative log-likelihoods, a scalar to differentiate, and each row's own.

        ``hidden`` is [rows, hidden], ``targets`` [rows] int64 below the vocabulary, ``weights`` [rows] of any sign.
        Both results are fp32; the second, [rows], is unweighted and detached. A backward pass scales the gradient
        in place, so one through a retained graph, a second time, raises RuntimeError. ValueError if the weights
        need a gradient.
        """
        if weights.requires_grad:
            raise ValueError("Weights that need a gradient cannot take this path: use log_probabilities.")
        projection = self.projection(hidden, 1.0)
        with torch.autocast(hidden.device.type, enabled=False):
            own, wanted = self.softmax.enter(hidden), torch.is_grad_enabled()
            return _WeightedLikelihood.apply(own, self.weight, self.bias, targets, weights, self, projection, wanted)

    def log_probabilities(
        self, hidden: Tensor, targets: Tensor, temperature: float = 1.0, entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probability of each target and, on request, the entropy of each row's distribution: [rows], fp32.

        ``hidden`` is [rows, hidden], ``targets`` [rows] int64 below the vocabulary. The logits are divided by
        ``temperature``. Both results can be differentiated once, with any upstream gradient.
        """
        projection = self.projection(hidden, temperature)
        with torch.autocast(hidden.device.type, enabled=False):
            own = self.softmax.enter(hidden)
            return _LogProbabilities.apply(own, self.weight, self.bias, targets, self, projection, entropy)

    @torch.no_grad()
    def top_log_probabilities(self, hidden: Tensor, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """The likeliest k tokens of each row, [rows, k] int64, and their log-probabilities with, last, that of all
        other tokens together, [rows, k + 1] fp32; -inf where there are no others.

        ValueError if k is not between 1 and the vocabulary.
        """
        if not 1 <= k <= self.vocabulary:
            raise ValueError(f"Of a vocabulary of {self.vocabulary} tokens {k} cannot be taken.")
        if self.part is not None:
            return self.whole().top_log_probabilities(hidden, k, temperature)
        with torch.autocast(hidden.device.type, enabled=False):
            chunks = self.chunks(self.projection(hidden, temperature), len(hidden))
            ids = torch.empty(len(hidden), k, dtype=torch.int64, device=hidden.device)
            logp = torch.empty(len(hidden), k + 1, dtype=chunks.sum, device=hidden.device)
            for rows in chunks.chunks:
                logits, peak = chunks.compute(hidden[rows].to(chunks.product))
                top, ids[rows] = logits.topk(k, dim=1)
                logits.scatter_(1, ids[rows], -torch.inf)
                rest = torch.zeros_like(peak)
                for tile in chunks.tiles:
                    rest += logits[:, tile].sub_(peak).exp_().sum(1, keepdim=True)
                total = rest + (top - peak).exp().sum(1, keepdim=True)
                logp[rows] = torch.cat([top - peak, rest.log()], 1) - total.log()
        return ids, logp

    def chunks(self, projection: Projection, rows: int, columns: int | None = None) -> LogitChunks:
        """The logits of so many rows over the real vocabulary, or its first ``columns``, chunk by chunk."""
        columns = self.softmax.columns(self.vocabulary, len(self.weight)) if columns is None else columns
        bias = None if self.bias is None else self.bias[:columns].detach()
        return LogitChunks(projection, self.weight[:columns].detach(), bias, rows)

    def whole(self) -> FusedHead:
        """The head over all ranks' rows; itself, if it has them."""
        if self.part is None:
            return self
        whole, group = copy.copy(self), self.part.group
        whole.weight = gather(self.weight, 0, group)
        whole.bias = None if self.bias is None else gather(self.bias, 0, group)
        whole.part, whole.softmax = None, Softmax()
        return whole

    def projection(self, hidden: Tensor, temperature: float) -> Projection:
        """How the logits of these hidden states are made, divided by a temperature."""
        return Projection(
            scale=self.scale / temperature,
            soft_cap=None if self.soft_cap is None else self.soft_cap / temperature,
            dtype=product_dtype(hidden, self.weight),
            limits=self.limits,
        )


# --- weights known: the gradient is made in the forward pass ------------------------------------------------


class _WeightedLikelihood(torch.autograd.Function):
    """sum_i w_i nll_i. With p the softmax of row i, the gradient of its logits is w_i (p - onehot(target_i))."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        weights: Tensor,
        head: FusedHead,
        projection: Projection,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        chunks, softmax = head.chunks(projection, len(hidden)), head.softmax
        weights = weights.to(chunks.sum)
        likelihood = torch.empty_like(weights)
        gradients = ForwardGradients(ctx, (hidden, weight, bias), weights, chunks, head.upstream, with_gradient)
        for rows in chunks.chunks:
            own, target = hidden[rows].to(chunks.product), targets[rows].unsqueeze(1)
            logits, peak = chunks.compute(own)
            peak = softmax.largest(peak)
            at_target = softmax.at(logits, target)
            total = torch.zeros_like(peak)
            for tile in chunks.tiles:
                part = logits[:, tile]
                slope = chunks.slope(part)
                total += part.sub_(peak).exp_().sum(1, keepdim=True)
                if slope is not None:
                    part.mul_(slope)
            total, slope = softmax.total(total), chunks.slope(at_target)
            likelihood[rows] = (total.log() + peak - softmax.total(at_target)).squeeze(1)
            if gradients.wanted:
                softmax.add_at(target, logits, -total, slope)
                share = (weights[rows] / gradients.power).unsqueeze(1) / total
                for tile in chunks.tiles:
                    gradients.add(rows, own, tile, logits[:, tile].mul_(share))
        gradients.keep(ctx)
        ctx.mark_non_differentiable(likelihood)
        return (weights * likelihood).sum(), likelihood

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return (*scaled(ctx, upstream), None, None, None, None, None)


# --- any upstream gradient: the logits are computed again ---------------------------------------------------


class _LogProbabilities(torch.autograd.Function):
    """log p(target) and the entropy H = -sum_j p_j log p_j.

    The gradient of a row's logits is onehot(target) - p for the one, and -p (log p + H) for the other.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        head: FusedHead,
        projection: Projection,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        chunks, softmax = head.chunks(projection, len(hidden)), head.softmax
        logp = torch.empty(len(hidden), dtype=chunks.sum, device=hidden.device)
        normalizer = torch.empty_like(logp)
        entropy = torch.empty_like(logp) if with_entropy else None
        for rows in chunks.chunks:
            logits, peak = chunks.compute(hidden[rows].to(chunks.product))
            peak = softmax.largest(peak)
            at_target = softmax.total(softmax.at(logits, targets[rows].unsqueeze(1)))
            total, expected = torch.zeros_like(peak), torch.zeros_like(peak)
            for tile in chunks.tiles:
                part = logits[:, tile].sub_(peak)
                likely = part.exp() if with_entropy else part.exp_()
                total += likely.sum(1, keepdim=True)
                if with_entropy:
                    expected += likely.mul_(part).sum(1, keepdim=True)
            total, expected = softmax.total(total), softmax.total(expected) if with_entropy else expected
            normalizer[rows] = (total.log() + peak).squeeze(1)
            logp[rows] = at_target.squeeze(1) - normalizer[rows]
            if entropy is not None:
                entropy[rows] = (total.log() - expected / total).squeeze(1)
        ctx.save_for_backward(hidden, weight, bias, targets, normalizer, entropy)
        ctx.head, ctx.projection = head, projection
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_logp: Tensor, of_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normalizer, entropy = ctx.saved_tensors
        with torch.autocast(hidden.device.type, enabled=False):
            chunks, softmax = ctx.head.chunks(ctx.projection, len(hidden)), ctx.head.softmax
            gradients = Gradients(chunks, (hidden, weight, bias), ctx.needs_input_grad[:3], ctx.head.in_place)
            for rows in chunks.chunks:
                own, target = hidden[rows].to(chunks.product), targets[rows].unsqueeze(1)
                upstream = of_logp[rows].unsqueeze(1)
                logits, _ = chunks.compute(own)
                at_target = softmax.at(logits, target)
                for tile in chunks.tiles:
                    part = logits[:, tile]
                    slope = chunks.slope(part)
                    part.sub_(normalizer[rows].unsqueeze(1))
                    if entropy is None or of_entropy is None:
                        part.exp_().mul_(-upstream)
                    else:
                        spread = part.add(entropy[rows].unsqueeze(1)).mul_(of_entropy[rows].unsqueeze(1))
                        part.exp_().mul_(spread.add_(upstream).neg_())
                    if slope is not None:
                        part.mul_(slope)
                softmax.add_at(target, logits, upstream, chunks.slope(at_target))
                for tile in chunks.tiles:
                    gradients.add(rows, own, tile, logits[:, tile])
        return (*rounded(gradients.sums(), gradients.dtypes), None, None, None, None)
