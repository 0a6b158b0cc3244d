"""Document attention: the attention of a packed batch, plugged into every transformers model.

A pack is one row of tokens, so a model must be told where its documents end. :class:`Documents` travels as a
keyword through the model's forward pass to :func:`attend`, which transformers calls in place of its own
attention. What an architecture passes beside query, key and value is respected: scale, sliding window, sinks,
soft cap, dropout. No mask is ever built; which mask the architecture wanted is looked at once, when it is
examined (:mod:`postlude.model.anatomy`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from postlude.model import kernels

NAME = "postlude_documents"
"""What this attention is called among transformers' attention implementations."""


@dataclass(frozen=True)
class Documents:
    """Where the documents of a pack are."""

    lengths: Tensor
    """[documents] int32, on the host."""
    offsets: Tensor
    """[documents + 1] int32, on the device: the cumulative lengths from zero."""
    longest: int
    """An upper bound of the lengths, a power of two: as a constant of a compiled layer it seldom changes."""

    @classmethod
    def of(cls, lengths: Tensor, device: torch.device) -> Documents:
        """From lengths [documents] that sum to the number of tokens; waits for the device if they are there."""
        held = lengths.to("cpu", torch.int32)
        offsets = F.pad(held.cumsum(0, dtype=torch.int32), (1, 0))
        longest = 1 << (int(held.max()) - 1).bit_length()
        return cls(held, offsets.to(device, non_blocking=True), longest)


class Refused(Exception):
    """What an architecture asks of its attention cannot be done by document. The message completes "it ..."."""


@dataclass(frozen=True)
class AttentionLayer:
    """The shape of one attention layer, as its call showed it."""

    heads: int
    key_dim: int
    value_dim: int
    window: int | None


_observed: list[AttentionLayer] | None = None
"""The shape of each attention call while an architecture is examined."""


@contextmanager
def observed() -> Iterator[list[AttentionLayer]]:
    """While this is open, attention compares the mask that each layer was given with what it computes, and notes the
    shape of the layer."""
    global _observed
    _observed = []
    try:
        yield _observed
    finally:
        _observed = None


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    documents: Documents | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each document, with the signature that transformers calls.

    ``query`` is [1, heads, tokens, dim], ``key`` and ``value`` [1, key heads, tokens, dim]; the output is
    [1, tokens, heads, value dim]. ``sliding_window`` counts the token itself; ``s_aux`` [heads] are sinks.
    """
    if _observed is not None:
        _observe(_observed, query, key, value, attention_mask, sliding_window)
    if documents is None or query.shape[0] != 1 or key.shape[2] != query.shape[2]:
        raise Refused("does not hand the documents of a pack through to its attention layers")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise Refused("attends to later tokens, so nothing can be predicted from earlier ones alone")
    if position_bias is not None:
        raise Refused("adds a learned bias by position to its attention")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    half = query.dtype in (torch.float16, torch.bfloat16)
    if softcap is not None or dropout or value.shape[-1] != query.shape[-1]:
        output = _each_span(query, key, value, documents, scale, sliding_window, softcap, s_aux, dropout)
    elif query.is_cpu or (query.is_cuda and half):
        rows = (query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1))
        if query.is_cuda and s_aux is None:  # the one case that torch differentiates by itself
            output, _ = kernels.varlen(*rows, documents.offsets, documents.longest, scale, sliding_window)
        else:
            bounds = (documents.lengths, documents.offsets)
            output, _ = kernels.document_attention(*rows, s_aux, *bounds, scale, sliding_window)
        output = output.unsqueeze(0)
    else:
        output = _each_span(query, key, value, documents, scale, sliding_window, None, s_aux, 0.0)
    return output, None


@torch.compiler.disable
def _each_span(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
) -> Tensor:
    """What no fused kernel does, a document (or a chunk of one, under a window) at a time."""
    groups = query.shape[1] // key.shape[1]
    outputs = []
    for span in kernels.spans(documents.lengths.tolist(), window):
        rows, keys = slice(span.start, span.end), slice(span.key_start, span.end)
        span_query, span_key, span_value = query[:, :, rows], key[:, :, keys], value[:, :, keys]
        if softcap is None and sinks is None:
            output = F.scaled_dot_product_attention(
                span_query,
                span_key,
                span_value,
                attn_mask=None if span.window is None else span.allowed(query.device),
                dropout_p=dropout,
                is_causal=span.window is None,
                scale=scale,
                enable_gqa=groups > 1,
            )
        else:
            logits = span_query @ span_key.repeat_interleave(groups, 1).mT * scale
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            logits = logits.masked_fill(~span.allowed(query.device), float("-inf"))
            if sinks is not None:
                columns = sinks.to(logits.dtype)[None, :, None, None].expand(*logits.shape[:3], 1)
                logits = torch.cat([logits, columns], dim=-1)
            probabilities = logits.softmax(-1, dtype=torch.float32)[..., : span_key.shape[2]]
            probabilities = F.dropout(probabilities.to(value.dtype), dropout)
            output = probabilities @ span_value.repeat_interleave(groups, 1)
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1)


# --- what the architecture's own mask says ------------------------------------------------------------------

_FAR = 1 << 18
"""A position beyond every window in use: a mask that still reaches back to zero from there has none."""


def mask_window(allowed: Callable[[Tensor, Tensor], Tensor]) -> int | None:
    """The sliding window of a mask given as a function of query and key positions; None for plain causal.

    :class:`Refused` if the mask is neither: blocks, chunks, a look ahead.
    """
    keys = torch.arange(_FAR + 64)
    reach = int(allowed(torch.tensor(_FAR), keys).sum())
    window = None if reach == _FAR + 1 else reach
    near = [0, 1, 2, 3] + ([] if window is None else [window - 1, window, window + 1, 2 * window + 1])
    for position in {*near, _FAR - 1, _FAR + 1}:
        expected = keys <= position
        if window is not None:
            expected &= keys > position - window
        if not torch.equal(allowed(torch.tensor(position), keys).expand_as(keys), expected):
            raise Refused("attends in a pattern that is neither causal nor a sliding window (chunks, for one)")
    return window


def _no_mask(*, mask_function: Callable[..., Tensor], use_vmap: bool = False, **_: Any) -> Tensor | None:
    """What transformers calls to build a mask: nothing is built; while observed, a mark that carries the window."""
    if _observed is None:
        return None
    if use_vmap:
        raise Refused("lays a pattern of its own over the causal mask")
    first = torch.tensor(0)
    window = mask_window(lambda query, key: mask_function(first, first, query, key))
    return torch.full((1, 1, 1, 1), -1 if window is None else window)


def _observe(
    layers: list[AttentionLayer], query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, window: int | None
) -> None:
    wanted = None
    if mask is not None:
        if mask.numel() != 1 or mask.dtype != torch.int64:
            raise Refused("builds an attention mask of its own")
        wanted = None if int(mask) == -1 else int(mask)
    if wanted != (window if window is None or window <= _FAR else None):
        raise Refused(
            f"masks a layer with a window of {wanted} but asks for {window} in its attention, which cannot both hold"
        )
    layers.append(AttentionLayer(query.shape[1], query.shape[-1], value.shape[-1], window))


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, _no_mask)
