"""Logits of a few rows at a time, the softmax over them, and the way back from their gradient: the arithmetic under the
fused head.

Notable:

- One buffer holds the logits of one chunk of rows, in fp32, and every chunk reuses it. Within a chunk the work
  goes through tiles of the vocabulary that fit into a processor's cache, so the passes over a tile cost little
  beside its matrix products, and nothing else that is needed is larger than a tile.
- Products run in one dtype, sums in fp32 (float64 for float64 input). The gradient of a logit is finished in
  fp32, with the target's one taken off, before it is rounded for a product.
- Where the weights of rows are known beforehand the gradient is made during the forward pass, while a chunk's logits
  are there; the backward pass then only scales (:class:`ForwardGradients`).
- A CPU without instructions for a low-precision dtype multiplies in fp32: faster there, and more exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from postlude.model.tensor_parallel import VocabularyPart, enter

MIB = 2**20
LOW_PRECISION_INSTRUCTIONS = {torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"), torch.float16: ("amx_fp16",)}
"""What a processor needs one of for fast products in a dtype, as ``torch.cpu.get_capabilities`` names it."""


@dataclass(frozen=True)
class Limits:
    """How much is worked on at once."""

    chunk_bytes: int
    """Size of the buffer of logits."""
    chunk_rows: int
    tile_bytes: int

    @staticmethod
    def of(device: torch.device) -> Limits:
        """What suits a device: a CPU's products gain nothing from more rows, its passes from what a cache holds."""
        if device.type == "cpu":
            return Limits(chunk_bytes=192 * MIB, chunk_rows=512, tile_bytes=16 * MIB)
        return Limits(chunk_bytes=512 * MIB, chunk_rows=8192, tile_bytes=128 * MIB)


@dataclass(frozen=True)
class Projection:
    """How logits follow: ``soft_cap * tanh(scale * (hidden @ weight.T + bias) / soft_cap)``, and in what dtype."""

    scale: float
    soft_cap: float | None
    dtype: torch.dtype
    """Of the matrix products."""
    limits: Limits


def product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype that matrix products run in: autocast's where it applies, else that of the operands."""
    device = hidden.device.type
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if dtype == torch.float32 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return torch.float32 if device == "cpu" and not cpu_multiplies(dtype) else dtype


def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether this processor has instructions for products in a dtype."""
    needed = LOW_PRECISION_INSTRUCTIONS.get(dtype)
    return needed is None or any(torch.cpu.get_capabilities().get(name, False) for name in needed)


class LogitChunks:
    """The logits of ``rows`` rows, chunk by chunk. ``weight`` is [vocabulary, hidden], ``bias`` [vocabulary]."""

    def __init__(self, projection: Projection, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        self.projection, self.bias = projection, bias
        self.product, self.sum = projection.dtype, torch.promote_types(projection.dtype, torch.float32)
        # Narrowed once for all chunks, but widened tile by tile: a wider copy of the whole would be large.
        self._weight = weight.to(self.product) if self.product.itemsize < weight.dtype.itemsize else weight
        limits, row_bytes = projection.limits, len(weight) * self.sum.itemsize
        most = max(1, min(limits.chunk_rows, limits.chunk_bytes // row_bytes))
        size = -(-rows // max(1, -(-rows // most)))  # as even as they come
        columns = max(1, limits.tile_bytes // (max(1, size, weight.shape[1]) * self.sum.itemsize))
        self.chunks = [slice(start, min(start + size, rows)) for start in range(0, rows, max(1, size))]
        self.tiles = [slice(a, min(a + columns, len(weight))) for a in range(0, len(weight), columns)]
        self._buffer = torch.empty(size, len(weight), dtype=self.sum, device=weight.device)

    def weight(self, tile: slice) -> Tensor:
        """[columns, hidden] of the weight, in the dtype of products."""
        return self._weight[tile].to(self.product)

    def compute(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The logits of a chunk, [rows, vocabulary] in the buffer, and the largest of each row, [rows, 1].

        ``hidden`` is [rows, hidden] in the dtype of products.
        """
        scale, cap = self.projection.scale, self.projection.soft_cap
        logits = self._buffer[: len(hidden)]
        peak = torch.full((len(hidden), 1), -torch.inf, dtype=self.sum, device=hidden.device)
        for tile in self.tiles:
            part = logits[:, tile]
            _add_product(part, hidden, self.weight(tile).t(), scale, overwrite=True)
            if self.bias is not None:
                part.add_(self.bias[tile], alpha=scale)
            if cap is not None:
                part.div_(cap).tanh_().mul_(cap)
            torch.maximum(peak, part.amax(1, keepdim=True), out=peak)
        return logits, peak

    def slope(self, logits: Tensor) -> Tensor | None:
        """The derivative of logits by what they were before the soft cap; None without one, where it is 1."""
        cap = self.projection.soft_cap
        return None if cap is None else logits.square().mul_(-1.0 / cap**2).add_(1.0)


class Softmax:
    """Every column is here."""

    def columns(self, vocabulary: int, rows: int) -> int:
        """How many of the head's ``rows`` here are real, of a vocabulary of so many tokens."""
        return vocabulary

    def enter(self, hidden: Tensor) -> Tensor:
        """The hidden states that logits are made of; what they are differentiated by is the sum over all columns."""
        return hidden

    def largest(self, values: Tensor) -> Tensor:
        """The largest over all columns, of what is the largest over those here; may be in place."""
        return values

    def total(self, values: Tensor) -> Tensor:
        """The sum over all columns, of what is the sum over those here; may be in place."""
        return values

    def at(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The logits [rows, 1] of the targets [rows, 1]; zero where another rank has them: they are to be summed."""
        return logits.gather(1, targets)

    def add_at(self, targets: Tensor, into: Tensor, values: Tensor, slope: Tensor | None) -> None:
        """Add ``values``, times ``slope``, [rows, 1], at the targets that are here."""
        add_at(targets, into, values, slope)


class SharedSoftmax(Softmax):
    """Some columns are here, the others on the other ranks, which have the same rows."""

    def __init__(self, part: VocabularyPart) -> None:
        self.part = part

    def columns(self, vocabulary: int, rows: int) -> int:
        return min(vocabulary - self.part.first, rows)

    def enter(self, hidden: Tensor) -> Tensor:
        return enter(hidden, self.part.group)

    def largest(self, values: Tensor) -> Tensor:
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.part.group)
        return values

    def total(self, values: Tensor) -> Tensor:
        dist.all_reduce(values, group=self.part.group)
        return values

    def at(self, logits: Tensor, targets: Tensor) -> Tensor:
        places, here = self._places(logits, targets)
        return logits.gather(1, places).masked_fill(~here, 0)

    def add_at(self, targets: Tensor, into: Tensor, values: Tensor, slope: Tensor | None) -> None:
        places, here = self._places(into, targets)
        add_at(places, into, (values * torch.ones_like(places)).masked_fill(~here, 0), slope)

    def _places(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        places = targets - self.part.first
        here = (places >= 0) & (places < logits.shape[1])
        return places.clamp(0, logits.shape[1] - 1), here


class Gradients:
    """The gradients of a head's ``inputs`` while they are summed over chunks and tiles; None for what needs none.

    The inputs are hidden states [rows, hidden], a weight [vocabulary, hidden] and a bias [vocabulary] or None; the last
    two may have further rows, which stay as they are. All is summed in the dtype of sums, and ``in_place`` does so in
    ``weight.grad`` where the weight is a leaf of that dtype.
    """

    def __init__(
        self,
        chunks: LogitChunks,
        inputs: tuple[Tensor, Tensor, Tensor | None],
        needed: Sequence[bool],
        in_place: bool,
        factor: float = 1.0,
    ) -> None:
        self._chunks, self._factor = chunks, chunks.projection.scale * factor
        self.dtypes = [None if of is None else of.dtype for of in inputs]
        weight = inputs[1]
        self._is_in_place = in_place and needed[1] and weight.is_leaf and weight.dtype == chunks.sum
        needed = (needed[0], needed[1] and not self._is_in_place, needed[2])
        self.hidden, self.weight, self.bias = (
            torch.zeros(of.shape, dtype=chunks.sum, device=of.device) if of is not None and need else None
            for of, need in zip(inputs, needed, strict=True)
        )
        if self._is_in_place:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            self.weight = weight.grad

    def sums(self) -> tuple[Tensor | None, ...]:
        """Those of hidden states, weight and bias, but for what is in ``weight.grad`` already."""
        return self.hidden, None if self._is_in_place else self.weight, self.bias

    def add(self, rows: slice, hidden: Tensor, tile: slice, gradient: Tensor) -> None:
        """Add ``factor`` times what the gradient of a tile's logits (before the soft cap) gives.

        ``gradient`` is [rows, columns] in the dtype of sums, ``hidden`` [rows, hidden] in that of products.
        """
        rounded = gradient.to(self._chunks.product)
        if self.hidden is not None:
            _add_product(self.hidden[rows], rounded, self._chunks.weight(tile), self._factor)
        if self.weight is not None:
            _add_product(self.weight[tile], rounded.t(), hidden, self._factor)
        if self.bias is not None:
            self.bias[tile].add_(gradient.sum(0), alpha=self._factor)


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
        needed = [with_gradient and need for need in ctx.needs_input_grad[:3]]
        self.wanted = any(needed)
        """Whether there is anything to make."""
        # Divided by a count of tokens, weights are smaller than fp16 can hold. A power of two rounds nothing.
        self.power = _power_of_two_above(weights) if self.wanted and chunks.product == torch.float16 else 1.0
        self._promised = promised
        factor = self.power * (1.0 if promised is None else promised)
        super().__init__(chunks, inputs, needed, promised is not None, factor)

    def keep(self, ctx: Any) -> None:
        """Leave them to the backward pass."""
        ctx.promised, ctx.dtypes = self._promised, self.dtypes
        ctx.save_for_backward(*self.sums())


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


def rounded(gradients: Iterable[Tensor | None], dtypes: Sequence[torch.dtype | None]) -> Iterable[Tensor | None]:
    """Each gradient in the dtype of its input."""
    return (None if g is None or dtype is None else g.to(dtype) for g, dtype in zip(gradients, dtypes, strict=True))


def add_at(places: Tensor, into: Tensor, values: Tensor, slope: Tensor | None) -> None:
    """Add ``values``, times ``slope``, at the columns ``places``, [rows, n], distinct in a row: no atomics needed."""
    into.scatter_(1, places, into.gather(1, places) + (values if slope is None else values * slope))


def _power_of_two_above(weights: Tensor) -> float:
    """A power of two above every magnitude and at most twice the largest; 1 if all are zero."""
    largest = float(weights.abs().max()) if weights.numel() else 0.0
    return math.ldexp(1.0, math.frexp(largest)[1]) if largest else 1.0


def _add_product(into: Tensor, left: Tensor, right: Tensor, factor: float, overwrite: bool = False) -> None:
    """``into += factor * left @ right``, or ``=``; of low-precision factors a GPU gives the product in fp32."""
    if left.dtype == into.dtype:
        into.addmm_(left, right, beta=0 if overwrite else 1, alpha=factor)
        return
    product = torch.mm(left, right, out_dtype=into.dtype) if left.is_cuda else torch.mm(left, right)
    if overwrite:
        into.copy_(product).mul_(factor)
    else:
        into.add_(product, alpha=factor)
