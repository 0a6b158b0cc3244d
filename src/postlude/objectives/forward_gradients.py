"""Gradients that a head makes during its forward pass, of a sum over rows whose weights are known beforehand.

A chunk's logits are there once: what is made of them at that moment need not be computed again in the backward pass,
which then only scales. This file is what every such function of a head shares.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from postlude.objectives.logits import Gradients, LogitChunks


class ForwardGradients(Gradients):
    """The gradients of ``inputs`` (hidden states, weight, bias) while the forward pass of a function makes them.

    ``ctx`` is the function's, whose first three inputs they are; ``weights``, [rows], those of the rows. ``promised``
    is the factor that the sum will enter the loss with, or None: then the gradient of a weight that is a leaf goes into
    ``weight.grad`` at once (see ``FusedHead.upstream``). The gradients that are added have to be divided by ``power``.
    """

    def __init__(
        self,
        ctx: Any,
        inputs: tuple[Tensor, Tensor, Tensor | None],
        weights: Tensor,
        chunks: LogitChunks,
        promised: float | None,
        with_gradient: bool,
    ) -> None:
        hidden, weight, bias = inputs
        needed = [with_gradient and need for need in ctx.needs_input_grad[:3]]
        self.wanted = any(needed)
        """Whether there is anything to make."""
        # Divided by a count of tokens, weights are smaller than fp16 can hold. A power of two rounds nothing.
        self.power = _power_of_two_above(weights) if self.wanted and chunks.product == torch.float16 else 1.0
        self._direct = needed[1] and promised is not None and collects(weight, chunks)
        self._promised, self._dtypes = promised, [None if of is None else of.dtype for of in inputs]
        self._sums = [
            zeros(hidden, needed[0], chunks),
            own_gradient(weight) if self._direct else zeros(weight, needed[1], chunks),
            zeros(bias, needed[2], chunks),
        ]
        super().__init__(chunks, self._sums, self.power * (1.0 if promised is None else promised))

    def keep(self, ctx: Any) -> None:
        """Leave them to the backward pass."""
        ctx.promised, ctx.dtypes = self._promised, self._dtypes
        hidden, weight, bias = self._sums
        ctx.save_for_backward(hidden, None if self._direct else weight, bias)


def scaled(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of the three inputs in the backward pass. RuntimeError if ``upstream`` is not what was promised."""
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
    return tuple(rounded(gradients, ctx.dtypes))


def zeros(like: Tensor | None, needed: bool, chunks: LogitChunks) -> Tensor | None:
    """A gradient to begin with, in the dtype of sums; None for what needs none."""
    if like is None or not needed:
        return None
    return torch.zeros(like.shape, dtype=chunks.sum, device=like.device)


def add_at(places: Tensor, into: Tensor, values: Tensor, slope: Tensor | None) -> None:
    """Add ``values``, times ``slope``, at the columns ``places``, [rows, n], distinct in a row: no atomics needed."""
    into.scatter_(1, places, into.gather(1, places) + (values if slope is None else values * slope))


def rounded(gradients: Iterable[Tensor | None], dtypes: Sequence[torch.dtype | None]) -> Iterable[Tensor | None]:
    """Each gradient in the dtype of its input."""
    return (None if g is None or dtype is None else g.to(dtype) for g, dtype in zip(gradients, dtypes, strict=True))


def collects(weight: Tensor, chunks: LogitChunks) -> bool:
    """Whether sums over a weight can be made in its own ``grad``."""
    return weight.is_leaf and weight.dtype == chunks.sum


def own_gradient(weight: Tensor) -> Tensor:
    """The ``grad`` of a leaf, to add to."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


def _power_of_two_above(weights: Tensor) -> float:
    """A power of two above every magnitude and at most twice the largest; 1 if all are zero."""
    largest = float(weights.abs().max()) if weights.numel() else 0.0
    return math.ldexp(1.0, math.frexp(largest)[1]) if largest else 1.0
