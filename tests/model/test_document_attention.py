"""Attention by document against the definition: a dense softmax over the pairs that may see each other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from postlude.model import attention, kernels
from postlude.model.attention import Documents, Refused, attend, mask_window

CPU = torch.device("cpu")


def dense(query, key, value, lengths, scale, window=None, softcap=None, sinks=None):
    """[1, tokens, heads, dim]: every pair scored, those outside document, causality or window left out."""
    tokens = query.shape[2]
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    row, column = torch.arange(tokens)[:, None], torch.arange(tokens)
    seen = (document[:, None] == document) & (column <= row)
    if window is not None:
        seen &= column > row - window
    groups = query.shape[1] // key.shape[1]
    logits = query @ key.repeat_interleave(groups, 1).mT * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        logits = torch.cat([logits, sinks[None, :, None, None].expand(1, -1, tokens, 1)], -1)
    probabilities = logits.softmax(-1)[..., :tokens]
    return (probabilities @ value.repeat_interleave(groups, 1)).transpose(1, 2)


def states(lengths, heads=4, key_heads=2, dim=8, value_dim=None, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(of, width):
        return torch.randn(1, sum(lengths), of, width, generator=generator, dtype=dtype).transpose(1, 2)

    return [
        part.requires_grad_() for part in (draw(heads, dim), draw(key_heads, dim), draw(key_heads, value_dim or dim))
    ]


def packed(query, key, value, lengths, scale, window=None, softcap=None, sinks=None):
    documents = Documents.of(torch.tensor(lengths), CPU)
    output, _ = attend(
        nn.Identity(),
        query,
        key,
        value,
        None,
        documents=documents,
        scaling=scale,
        sliding_window=window,
        softcap=softcap,
        s_aux=sinks,
    )
    return output


def assert_same_with_gradients(inputs, sinks, lengths, scale, window, softcap):
    results = []
    for attention_function in (dense, packed):
        output = attention_function(*inputs, lengths, scale, window, softcap, sinks)
        direction = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape)
        wanted = inputs if sinks is None else [*inputs, sinks]
        results.append([output, *torch.autograd.grad((output * direction).sum(), wanted)])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


lengths_strategy = st.lists(st.integers(1, 40), min_size=1, max_size=6)


@pytest.mark.capability("Document attention")
@settings(max_examples=40, deadline=None)
@given(
    lengths=lengths_strategy,
    key_heads=st.sampled_from([1, 2, 4]),
    scale=st.sampled_from([0.1, 0.35, 1.0]),
    window=st.sampled_from([None, 1, 3, 16]),
    softcap=st.sampled_from([None, 2.0]),
    with_sinks=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_output_and_every_gradient_equal_the_definition(lengths, key_heads, scale, window, softcap, with_sinks, seed):
    inputs = states(lengths, key_heads=key_heads, seed=seed)
    sinks = torch.randn(4, dtype=torch.float64).requires_grad_() if with_sinks else None
    assert_same_with_gradients(inputs, sinks, lengths, scale, window, softcap)


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("window", [7, 300, 511])
def test_documents_longer_than_a_window_are_worked_on_in_chunks(window, with_sinks):
    lengths = [700, 3, 301]
    inputs = states(lengths, heads=2, key_heads=1)
    sinks = torch.tensor([0.5, -1.0], dtype=torch.float64).requires_grad_() if with_sinks else None
    assert any(len(list(kernels.spans([length], window))) > 1 for length in lengths)
    assert_same_with_gradients(inputs, sinks, lengths, 0.3, window, None)


def test_each_document_is_bitwise_what_it_is_alone():
    lengths = [33, 1, 128, 7]
    query, key, value = states(lengths, dtype=torch.float32)
    together = packed(query, key, value, lengths, 0.25)
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        alone = F.scaled_dot_product_attention(
            query[:, :, rows], key[:, :, rows], value[:, :, rows], is_causal=True, scale=0.25, enable_gqa=True
        )
        assert torch.equal(together[:, rows], alone.transpose(1, 2))
        start += length


def test_values_may_be_narrower_than_keys():
    lengths = [5, 12]
    inputs = states(lengths, dim=12, value_dim=8)
    torch.testing.assert_close(packed(*inputs, lengths, 0.3), dense(*inputs, lengths, 0.3))


def test_the_operator_keeps_torchs_rules():
    query, key, value = (part[0].transpose(0, 1) for part in states([5, 9], dtype=torch.float32))
    documents = Documents.of(torch.tensor([5, 9]), CPU)
    sinks = torch.randn(4).requires_grad_()
    torch.library.opcheck(
        kernels.document_attention,
        (query, key, value, sinks, documents.lengths, documents.offsets, 0.3, 4),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_autocast_reaches_attention():
    lengths = [5, 9]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert packed(*states(lengths, dtype=torch.float32), lengths, 0.3).dtype == torch.bfloat16


def test_dropout_drops():
    lengths = [64]
    query, key, value = states(lengths, dtype=torch.float32)
    documents = Documents.of(torch.tensor(lengths), CPU)
    ones = torch.ones_like(value)
    torch.manual_seed(0)
    output, _ = attend(nn.Identity(), query, key, ones, None, documents=documents, dropout=0.5)
    assert output.std() > 0.05  # without dropout every row of ones stays one
    assert abs(float(output.detach().mean()) - 1) < 0.1


@pytest.mark.parametrize("change", ["no documents", "two rows", "look ahead", "bias"])
def test_what_it_cannot_do_is_refused(change):
    query, key, value = states([6])
    arguments = {"documents": Documents.of(torch.tensor([6]), CPU)}
    if change == "no documents":
        arguments = {}
    if change == "two rows":
        query, key, value = (part.expand(2, -1, -1, -1) for part in (query, key, value))
    if change == "look ahead":
        arguments["is_causal"] = False
    if change == "bias":
        arguments["position_bias"] = torch.zeros(1)
    with pytest.raises(Refused):
        attend(nn.Identity(), query, key, value, None, **arguments)


def test_document_bounds():
    documents = Documents.of(torch.tensor([3, 1, 5]), CPU)
    assert documents.offsets.tolist() == [0, 3, 4, 9]
    assert documents.offsets.dtype == documents.lengths.dtype == torch.int32
    assert documents.longest == 8


@given(window=st.integers(1, 5000))
@settings(max_examples=20, deadline=None)
def test_a_window_is_read_from_a_mask(window):
    assert mask_window(lambda query, key: (key <= query) & (key > query - window)) == window


def test_a_plain_causal_mask_has_no_window():
    assert mask_window(lambda query, key: key <= query) is None


@pytest.mark.parametrize(
    "mask",
    [
        lambda query, key: (key <= query) & (key // 100 == query // 100),
        lambda query, key: key <= query + 1,
        lambda query, key: (key <= query) & ((query - key) % 2 == 0),
        lambda query, key: (key <= query) & ((key > query - 10) | (key < 4)),
    ],
    ids=["chunks", "look ahead", "strides", "global tokens"],
)
def test_any_other_pattern_is_refused(mask):
    with pytest.raises(Refused):
        mask_window(mask)


def test_nothing_is_observed_outside_an_examination():
    with attention.observed() as layers:
        packed(*states([4]), [4], 0.3)
    packed(*states([4]), [4], 0.3)
    assert [layer.heads for layer in layers] == [4]
