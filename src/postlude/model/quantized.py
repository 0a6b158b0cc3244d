"""Frozen linear layers in 8 or 4 bits, as the base of an adapter.

torchao packs a weight and unpacks it; what is done here is that nothing else is kept. Left to autograd, each unpacked
weight would stay for the backward pass, and nothing would be saved.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from postlude.manifest.adapter import Held
from postlude.manifest.problem import ManifestError
from postlude.model.anatomy import linear_layers
from postlude.model.places import is_adapter_part

NF4_BLOCK, NF4_SCALES = 64, 256
"""Weights that share a scale, and scales that share one of their own (Dettmers et al., 2023)."""


class QuantizedLinear(nn.Module):
    """A linear layer whose weight [out, in] is packed, and unpacked where it is used, in both passes."""

    def __init__(self, linear: nn.Linear, kind: Held, name: str) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        packed = pack_weight(linear.weight.detach(), kind, name)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = linear.bias

    def forward(self, rows: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return _Product.apply(rows, self.weight, self.bias)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return F.linear(rows, unpack(weight).to(rows.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ unpack(ctx.weight).to(gradient.dtype), None, None


def quantize(causal: PreTrainedModel, kind: Held) -> None:
    """Pack the weights of all linear layers inside the decoder layers but those of an adapter.

    ManifestError if torchao is not there, or a weight cannot be packed.
    """
    paths = [path for group in linear_layers(causal).values() for path in group if not is_adapter_part(path)]
    for path in paths:
        parent, _, name = path.rpartition(".")
        linear: Any = causal.get_submodule(path)
        setattr(causal.get_submodule(parent), name, QuantizedLinear(linear, kind, path))


def pack_weight(weight: Tensor, kind: Held, name: str) -> Tensor:
    """A tensor of torchao. ManifestError as :func:`quantize`."""
    torchao = _torchao()
    if kind == "int8":
        linear = nn.Linear(1, 1, bias=False)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        torchao.quantize_(linear, torchao.Int8WeightOnlyConfig())
        return linear.weight.detach()
    blocks, rest = divmod(weight.numel(), NF4_BLOCK)
    if rest:
        raise ManifestError(
            f"adapter.base: the weight of '{name}' has {weight.numel()} numbers, which nf4 cannot divide into blocks "
            f"of {NF4_BLOCK}. Choose int8."
        )
    return torchao.to_nf4(weight, NF4_BLOCK, math.gcd(blocks, NF4_SCALES))


def unpack(weight: Any) -> Tensor:
    """A packed weight as numbers, in the dtype that it had."""
    return weight.get_original_weight() if hasattr(weight, "get_original_weight") else weight.dequantize()


def packed_bytes(shape: tuple[int, ...], kind: Held) -> int:
    """What :func:`pack_weight` takes of a weight of this shape."""
    numbers = math.prod(shape)
    if kind == "int8":
        return numbers + 5 * shape[0]  # a scale and a zero for each row
    return numbers // 2 + numbers // NF4_BLOCK


def _torchao() -> Any:
    try:
        import torchao.quantization
    except ImportError as error:
        raise ManifestError(
            "adapter.base: a base in 8 or 4 bits needs torchao. Install it with: pip install 'postlude[quantized]'"
        ) from error
    return torchao.quantization
