"""Logits of a few rows at a time, and the way back from their gradient: the arithmetic under the fused head.

Notable:

- One buffer holds the logits of one chunk of rows, in fp32, and every chunk reuses it. Within a chunk the work
  goes through tiles of the vocabulary that fit into a processor's cache, so the passes over a tile cost little
  beside its matrix products, and nothing else that is needed is larger than a tile.
- Products run in one dtype, sums in fp32 (float64 for float64 input). The gradient of a logit is finished in
  fp32, with the target's one taken off, before it is rounded for a product.
- A CPU without instructions for a low-precision dtype multiplies in fp32: faster there, and more exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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


class Gradients:
    """The gradients of a head's inputs while they are summed over chunks and tiles; None for what needs none.

    ``hidden`` is [rows, hidden], ``weight`` [vocabulary, hidden] and ``bias`` [vocabulary]; the last two may have
    further rows, which stay as they are. All are in the dtype of sums.
    """

    def __init__(self, chunks: LogitChunks, sums: Sequence[Tensor | None], factor: float = 1.0) -> None:
        self._chunks, self._factor = chunks, chunks.projection.scale * factor
        self.hidden, self.weight, self.bias = sums

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
