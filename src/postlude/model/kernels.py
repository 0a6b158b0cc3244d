"""Fused attention over packed documents as one opaque operator, with windows and sinks.

Notable:

- One call of the flash kernel for each document, or for each chunk of a document where a sliding window is
  shorter than it, so that no mask larger than [chunk, chunk + window] is ever built and nothing is spent on
  pairs of tokens in different documents.
- Autograd sees a single node that keeps query, key, value, output and log-sum-exp; ``torch.compile`` sees a
  single operator whose lengths are data, so it neither breaks the graph nor recompiles for another pack.
- An attention sink (gpt-oss) is a logit without a value. It only rescales the output and the log-sum-exp after
  the kernel; the kernel's own backward, given the rescaled pair, then computes the right gradients, since it
  rebuilds the probabilities from the log-sum-exp.

On a CPU this runs torch's flash kernel; on CUDA the kernel behind ``varlen_attn``.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.varlen import AuxRequest, varlen_attn

_CHUNK = (64, 256)
"""Fewest and most queries of one kernel call under a sliding window: enough to fill the kernel, few enough for a
small mask."""


class Span(NamedTuple):
    """Rows of a pack that one kernel call works on: queries [start, end) against keys [key_start, end)."""

    start: int
    end: int
    key_start: int
    window: int | None
    """None where plain causal attention is all there is to it."""

    def allowed(self, device: torch.device) -> Tensor:
        """[queries, keys] bool: which keys each query sees."""
        query = torch.arange(self.start, self.end, device=device)[:, None]
        key = torch.arange(self.key_start, self.end, device=device)
        seen = key <= query
        return seen if self.window is None else seen & (key > query - self.window)


def spans(lengths: Sequence[int], window: int | None) -> Iterator[Span]:
    """The kernel calls that cover documents of these lengths, in order; ``window`` counts the token itself."""
    begin = 0
    for length in lengths:
        end = begin + length
        if window is None or length <= window:
            if length:
                yield Span(begin, end, begin, None)
        else:
            chunk = min(max(window, _CHUNK[0]), _CHUNK[1])
            for start in range(begin, end, chunk):
                stop, key_start = min(start + chunk, end), max(begin, start - window + 1)
                whole = key_start == start and stop - start <= window
                yield Span(start, stop, key_start, None if whole else window)
        begin = end


@torch.library.custom_op("postlude::document_attention", mutates_args=())
def document_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    lengths: Tensor,
    offsets: Tensor,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """Causal attention within each document.

    ``query`` is [tokens, heads, dim]; ``key`` and ``value`` are [tokens, key heads, dim]; ``sinks`` is [heads];
    ``lengths`` is [documents] int32 on the host and ``offsets`` [documents + 1] int32, its cumulative sum, on
    the device. Returns the output [tokens, heads, dim] and the log-sum-exp of each row's logits [tokens, heads].
    """
    if query.is_cuda:
        output, logsumexp = varlen(query, key, value, offsets, int(lengths.max()), scale, window)
        logsumexp = logsumexp.transpose(0, 1).contiguous()
    else:
        output, logsumexp = _cpu_forward(query, key, value, lengths, scale, window)
    if sinks is not None:
        logits = sinks.to(logsumexp.dtype)
        output = (output * torch.sigmoid(logsumexp - logits).unsqueeze(-1)).to(query.dtype)
        logsumexp = torch.logaddexp(logsumexp, logits)
    return output, logsumexp


@document_attention.register_fake
def _(query, key, value, sinks, lengths, offsets, scale, window):
    statistics = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=statistics)


@torch.library.custom_op("postlude::document_attention_backward", mutates_args=())
def _backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    lengths: Tensor,
    offsets: Tensor,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    gradient = gradient.contiguous()
    if not query.is_cuda:
        return _cpu_backward(gradient, query, key, value, output, logsumexp, lengths, scale, window)
    longest = int(lengths.max())
    return torch.ops.torch_attn._varlen_attn_backward(
        gradient,
        query,
        key,
        value,
        output,
        logsumexp.transpose(0, 1).contiguous(),
        offsets,
        offsets,
        longest,
        longest,
        window is None,
        torch.zeros(2, dtype=torch.uint64, device=query.device),
        scale,
        list(_flash_window(window)),
    )


@_backward.register_fake
def _(gradient, query, key, value, output, logsumexp, lengths, offsets, scale, window):
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, sinks, lengths, offsets, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(query, key, value, sinks, lengths, offsets, *output)


def _differentiate(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, sinks, lengths, offsets, output, logsumexp = ctx.saved_tensors
    gradients = _backward(gradient, query, key, value, output, logsumexp, lengths, offsets, ctx.scale, ctx.window)
    for_sinks = None
    if sinks is not None:
        share = torch.exp(sinks.to(logsumexp.dtype) - logsumexp)  # the probability that went to the sink
        for_sinks = -(share * (gradient * output).sum(-1)).sum(0).to(sinks.dtype)
    return (*gradients, for_sinks, None, None, None, None)


document_attention.register_autograd(_differentiate, setup_context=_save)


# --- CPU ----------------------------------------------------------------------------------------------------


def _heads_first(rows: Tensor) -> Tensor:
    """[tokens, heads, dim] as the view [1, heads, tokens, dim] that the kernels take."""
    return rows.transpose(0, 1).unsqueeze(0)


def _flash_arguments(span: Span, dtype: torch.dtype, masks: dict[tuple[int, ...], Tensor]) -> dict[str, Any]:
    if span.window is None:
        return {"is_causal": True}
    shape = (span.end - span.start, span.end - span.key_start, span.start - span.key_start)
    if shape not in masks:
        allowed = span.allowed(torch.device("cpu"))
        masks[shape] = torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, float("-inf"))
    return {"is_causal": False, "attn_mask": masks[shape]}


def _cpu_forward(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    outputs, statistics = [], []
    masks: dict[tuple[int, ...], Tensor] = {}
    for span in spans(lengths.tolist(), window):
        output, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            _heads_first(query[span.start : span.end]),
            _heads_first(key[span.key_start : span.end]),
            _heads_first(value[span.key_start : span.end]),
            scale=scale,
            **_flash_arguments(span, query.dtype, masks),
        )
        outputs.append(output[0].transpose(0, 1))
        statistics.append(logsumexp[0].transpose(0, 1))
    return torch.cat(outputs).contiguous(), torch.cat(statistics).contiguous()


def _cpu_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    lengths: Tensor,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    for_query = query.new_empty(query.shape)
    for_key, for_value = key.new_zeros(key.shape), value.new_zeros(value.shape)
    masks: dict[tuple[int, ...], Tensor] = {}
    for span in spans(lengths.tolist(), window):
        rows, keys = slice(span.start, span.end), slice(span.key_start, span.end)
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _heads_first(gradient[rows]),
            _heads_first(query[rows]),
            _heads_first(key[keys]),
            _heads_first(value[keys]),
            _heads_first(output[rows]),
            logsumexp[rows].transpose(0, 1).unsqueeze(0),
            dropout_p=0.0,
            scale=scale,
            **_flash_arguments(span, query.dtype, masks),
        )
        for_query[rows] = parts[0][0].transpose(0, 1)
        for_key[keys] += parts[1][0].transpose(0, 1)
        for_value[keys] += parts[2][0].transpose(0, 1)
    return for_query, for_key, for_value


# --- CUDA ---------------------------------------------------------------------------------------------------

_ASKS_FOR_SHARED_HEADS = "enable_gqa" in inspect.signature(varlen_attn).parameters
"""Since torch 2.12; before, the kernel shared key heads without being shared_heads."""


def varlen(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, longest: int, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """Torch's attention over documents on CUDA, differentiable but for the second result, the log-sum-exp
    [heads, tokens]. Shapes as in :func:`document_attention`; fp16 or bf16."""
    shared_heads: dict[str, Any] = {"enable_gqa": key.shape[1] != query.shape[1]} if _ASKS_FOR_SHARED_HEADS else {}
    return varlen_attn(  # type: ignore[return-value]
        query,
        key,
        value,
        offsets,
        offsets,
        longest,
        longest,
        return_aux=AuxRequest(lse=True),
        scale=scale,
        window_size=_flash_window(window),
        **shared_heads,
    )


def _flash_window(window: int | None) -> tuple[int, int]:
    """The window as the CUDA kernels count it: how many tokens to the left, and none to the right."""
    return (-1 if window is None else window - 1, 0)
