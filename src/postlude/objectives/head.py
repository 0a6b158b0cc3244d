"""The fused language-model head: from hidden states to losses without ever holding [rows, vocabulary].

Notable:

- Two paths. Where the weight of every row is known beforehand, the gradient is made during the forward pass, as
  soon as a chunk's logits are there: three products in all. Where it is not (a preference loss, a policy ratio),
  the backward pass computes the logits again: four.
- The caller drops the rows that are not trained; nothing is spent on them.
- A gradient is made only for what needs one: not for a frozen head, not for the hidden states of a frozen model.
- On request the weight's gradient goes into ``weight.grad`` at once: however many micro-batches a step has, a
  second gradient of the size of the vocabulary is never allocated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from postlude.objectives.logits import Gradients, Limits, LogitChunks, Projection, product_dtype


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
        limits: Limits | None = None,
    ) -> None:
        self.weight, self.bias = weight, bias
        self.vocabulary = len(weight) if vocabulary is None else vocabulary
        self.scale, self.soft_cap, self.upstream = scale, soft_cap, upstream
        self.limits = limits or Limits.of(weight.device)
        if not 0 < self.vocabulary <= len(weight):
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
        projection = self._projection(hidden, 1.0)
        with torch.autocast(hidden.device.type, enabled=False):
            return _WeightedLikelihood.apply(
                hidden, self.weight, self.bias, targets, weights, self, projection, torch.is_grad_enabled()
            )

    def log_probabilities(
        self, hidden: Tensor, targets: Tensor, temperature: float = 1.0, entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probability of each target and, on request, the entropy of each row's distribution: [rows], fp32.

        ``hidden`` is [rows, hidden], ``targets`` [rows] int64 below the vocabulary. The logits are divided by
        ``temperature``. Both results can be differentiated once, with any upstream gradient.
        """
        projection = self._projection(hidden, temperature)
        with torch.autocast(hidden.device.type, enabled=False):
            return _LogProbabilities.apply(hidden, self.weight, self.bias, targets, self, projection, entropy)

    def chunks(self, projection: Projection, rows: int) -> LogitChunks:
        """The logits of so many rows over the real vocabulary, chunk by chunk."""
        bias = None if self.bias is None else self.bias[: self.vocabulary].detach()
        return LogitChunks(projection, self.weight[: self.vocabulary].detach(), bias, rows)

    def _projection(self, hidden: Tensor, temperature: float) -> Projection:
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
        chunks = head.chunks(projection, len(hidden))
        weights = weights.to(chunks.sum)
        likelihood = torch.empty_like(weights)
        needed = [with_gradient and need for need in ctx.needs_input_grad[:3]]
        direct = needed[1] and head.upstream is not None and weight.is_leaf and weight.dtype == chunks.sum
        # Divided by a count of tokens, weights are smaller than fp16 can hold. A power of two rounds nothing.
        power = _power_of_two_above(weights) if any(needed) and chunks.product == torch.float16 else 1.0
        sums = [
            _zeros(hidden, needed[0], chunks),
            _own_gradient(weight) if direct else _zeros(weight, needed[1], chunks),
            _zeros(bias, needed[2], chunks),
        ]
        gradients = Gradients(chunks, sums, power * (1.0 if head.upstream is None else head.upstream))
        for rows in chunks.chunks:
            own, target = hidden[rows].to(chunks.product), targets[rows].unsqueeze(1)
            logits, peak = chunks.compute(own)
            at_target = logits.gather(1, target)
            total = torch.zeros_like(peak)
            for tile in chunks.tiles:
                part = logits[:, tile]
                slope = chunks.slope(part)
                total += part.sub_(peak).exp_().sum(1, keepdim=True)
                if slope is not None:
                    part.mul_(slope)
            likelihood[rows] = (total.log() + peak - at_target).squeeze(1)
            if any(needed):
                _add_at(target, logits, -total, chunks.slope(at_target))
                share = (weights[rows] / power).unsqueeze(1) / total
                for tile in chunks.tiles:
                    gradients.add(rows, own, tile, logits[:, tile].mul_(share))
        ctx.promised = head.upstream
        ctx.dtypes = [None if of is None else of.dtype for of in (hidden, weight, bias)]
        ctx.save_for_backward(sums[0], None if direct else sums[1], sums[2])
        ctx.mark_non_differentiable(likelihood)
        return (weights * likelihood).sum(), likelihood

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        if ctx.promised is not None:
            torch._assert_async(
                upstream == ctx.promised,
                f"The head was promised that its sum enters the loss with the factor {ctx.promised}, and the gradient "
                "of its weight is already made so. Put factors into the weights of the rows instead.",
            )
        elif upstream.is_cuda or upstream != 1:  # to ask a GPU costs more than to multiply
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(upstream)
        return (*_rounded(gradients, ctx.dtypes), None, None, None, None, None)


def _own_gradient(weight: Tensor) -> Tensor:
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


def _power_of_two_above(weights: Tensor) -> float:
    """A power of two above every magnitude and at most twice the largest; 1 if all are zero."""
    largest = float(weights.abs().max()) if weights.numel() else 0.0
    return math.ldexp(1.0, math.frexp(largest)[1]) if largest else 1.0


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
        chunks = head.chunks(projection, len(hidden))
        logp = torch.empty(len(hidden), dtype=chunks.sum, device=hidden.device)
        normalizer = torch.empty_like(logp)
        entropy = torch.empty_like(logp) if with_entropy else None
        for rows in chunks.chunks:
            logits, peak = chunks.compute(hidden[rows].to(chunks.product))
            at_target = logits.gather(1, targets[rows].unsqueeze(1))
            total, expected = torch.zeros_like(peak), torch.zeros_like(peak)
            for tile in chunks.tiles:
                part = logits[:, tile].sub_(peak)
                likely = part.exp() if with_entropy else part.exp_()
                total += likely.sum(1, keepdim=True)
                if with_entropy:
                    expected += likely.mul_(part).sum(1, keepdim=True)
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
        inputs = (hidden, weight, bias)
        with torch.autocast(hidden.device.type, enabled=False):
            chunks = ctx.head.chunks(ctx.projection, len(hidden))
            sums = [_zeros(of, need, chunks) for of, need in zip(inputs, ctx.needs_input_grad, strict=False)]
            gradients = Gradients(chunks, sums)
            for rows in chunks.chunks:
                own, target = hidden[rows].to(chunks.product), targets[rows].unsqueeze(1)
                upstream = of_logp[rows].unsqueeze(1)
                logits, _ = chunks.compute(own)
                at_target = logits.gather(1, target)
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
                _add_at(target, logits, upstream, chunks.slope(at_target))
                for tile in chunks.tiles:
                    gradients.add(rows, own, tile, logits[:, tile])
        return (*_rounded(sums, [None if of is None else of.dtype for of in inputs]), None, None, None, None)


def _zeros(like: Tensor | None, needed: bool, chunks: LogitChunks) -> Tensor | None:
    if like is None or not needed:
        return None
    return torch.zeros(like.shape, dtype=chunks.sum, device=like.device)


def _add_at(target: Tensor, into: Tensor, values: Tensor, slope: Tensor | None) -> None:
    """Add ``values``, times ``slope``, where each row's target is. Exactly one place a row: no atomics needed."""
    into.scatter_(1, target, into.gather(1, target) + (values if slope is None else values * slope))


def _rounded(gradients: Iterable[Tensor | None], dtypes: Sequence[torch.dtype | None]) -> Iterable[Tensor | None]:
    """Each gradient in the dtype of its input."""
    return (None if g is None or dtype is None else g.to(dtype) for g, dtype in zip(gradients, dtypes, strict=True))
