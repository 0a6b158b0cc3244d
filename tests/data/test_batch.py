"""Documents and the packed batch, against a plain reading of what each field means."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from postlude.data.batch import collate
from postlude.data.document import Document, Unit, define_stream, stream

TEACHER = define_stream("test_teacher", "float32", fill=-1.5, width=(2,))
EXPERTS = define_stream("test_experts", "int64", fill=7)


@st.composite
def documents(draw):
    length = draw(st.integers(1, 6))
    streams = {}
    if draw(st.booleans()):
        streams["weight"] = np.array(draw(st.lists(st.sampled_from([0.0, 0.5, 2.0]), min_size=length, max_size=length)))
    if draw(st.booleans()):
        streams["test_teacher"] = np.arange(2 * length, dtype=np.float32).reshape(length, 2)
    if draw(st.booleans()):
        streams["test_experts"] = np.arange(length)
    tokens = np.array(draw(st.lists(st.integers(0, 2**20), min_size=length, max_size=length)))
    name = draw(st.text(max_size=3))
    return Document(f"s:{name}", "s", tokens, streams, draw(st.integers(-1, 3)), draw(st.integers(-1, 3)))


units = st.lists(documents(), min_size=1, max_size=3).map(lambda several: Unit(tuple(several)))
batches = st.lists(st.lists(units, max_size=3).map(tuple), max_size=4)


@given(batches, st.one_of(st.none(), st.integers(0, 9)))
def test_every_field_is_what_the_blocks_say(blocks, extra):
    laid = [
        (u, place, d) for u, unit in enumerate(u for b in blocks for u in b) for place, d in enumerate(unit.documents)
    ]
    total = sum(len(document) for _, _, document in laid)
    pad_to = None if extra is None else max(total + extra, 1)
    batch = collate(blocks, ("test_teacher", "test_experts"), pad_to)
    padding = (pad_to or max(total, 1)) - total

    tokens, positions, owners, weight, teacher, experts = [], [], [], [], [], []
    for i, (_, _, document) in enumerate(laid):
        size = len(document)
        tokens += document.tokens.tolist()
        positions += range(size)
        owners += [i] * size
        weight += [0.0, *document.streams.get("weight", np.zeros(size))[1:]]
        teacher += document.streams.get("test_teacher", np.full((size, 2), -1.5)).tolist()
        experts += document.streams.get("test_experts", np.full(size, 7)).tolist()
    assert batch.tokens.tolist() == tokens + [0] * padding
    assert batch.positions.tolist() == positions + list(range(padding))
    assert batch.document.tolist() == owners + [len(laid)] * padding
    assert batch.weight.tolist() == weight + [0.0] * padding
    assert batch.streams["test_teacher"].tolist() == teacher + [[-1.5, -1.5]] * padding
    assert batch.streams["test_experts"].tolist() == experts + [7] * padding

    pad = [-1] if padding else []
    assert batch.lengths.tolist() == [len(document) for _, _, document in laid] + ([padding] if padding else [])
    assert batch.unit.tolist() == [unit for unit, _, _ in laid] + pad
    assert batch.place.tolist() == [place for _, place, _ in laid] + pad
    assert batch.group.tolist() == [document.group for _, _, document in laid] + pad
    assert batch.trajectory.tolist() == [document.trajectory for _, _, document in laid] + pad
    assert batch.example_ids == tuple(document.example_id for _, _, document in laid)
    assert batch.sources == ("s",) * len(laid)
    assert (batch.documents, batch.real_tokens) == (len(laid), total)
    assert batch.units == sum(len(block) for block in blocks)

    for field, dtype in (("tokens", torch.int64), ("positions", torch.int64), ("lengths", torch.int32)):
        assert getattr(batch, field).dtype == dtype
    assert batch.weight.dtype == torch.float32
    assert batch.streams["test_experts"].dtype == torch.int64


@given(batches, st.integers(0, 3))
def test_reduction_by_document_is_the_sum_over_its_tokens(blocks, extra):
    batch = collate(blocks, pad_to=max(sum(len(u) for b in blocks for u in b), 1) + extra)
    values = torch.arange(len(batch.tokens), dtype=torch.float64)
    parts = values.split(batch.lengths.tolist())[: batch.documents]
    assert batch.per_document(values).tolist() == [part.sum().item() for part in parts]
    rows = batch.trained_rows()
    assert rows.tolist() == [t for t, weight in enumerate(batch.weight.tolist()) if weight]
    expected = [0.0] * batch.documents
    for row in rows.tolist():
        expected[batch.document[row]] += row
    assert batch.per_document(values[rows], rows).tolist() == expected
    trained = [d.trained_tokens for block in blocks for unit in block for d in unit.documents]
    assert batch.per_document(torch.ones(len(rows)), rows).tolist() == trained


def test_a_rank_without_work_still_has_a_batch():
    for blocks in ([], [(), ()]):
        batch = collate(blocks)
        assert batch.tokens.tolist() == [0]
        assert batch.lengths.tolist() == [1]
        assert (batch.documents, batch.units, batch.real_tokens) == (0, 0, 0)
        assert not batch.trained_rows().numel()
        assert batch.per_document(torch.ones(1)).shape == (0,)


def test_a_gradient_flows_through_the_reduction():
    batch = collate([(Unit((Document("s:a", "s", np.arange(3)), Document("s:b", "s", np.arange(2)))),)], pad_to=8)
    values = torch.zeros(8, requires_grad=True)
    (batch.per_document(values) @ torch.tensor([1.0, 10.0])).backward()
    assert values.grad.tolist() == [1, 1, 1, 10, 10, 0, 0, 0]


def test_a_batch_moves_whole():
    batch = collate([(Unit((Document("s:a", "s", np.arange(3)),)),)], ("test_teacher",)).to("meta")
    assert all(value.device.type == "meta" for value in vars(batch).values() if isinstance(value, torch.Tensor))
    assert {value.device.type for value in batch.streams.values()} == {"meta"}


def test_blocks_that_hold_more_than_is_padded_to_are_refused():
    with pytest.raises(ValueError, match="hold 3 tokens, more than the 2"):
        collate([(Unit((Document("s:a", "s", np.arange(3)),)),)], pad_to=2)


def test_a_document_is_checked_when_it_is_made():
    with pytest.raises(ValueError, match="s:empty: a document is a row of at least one token"):
        Document("s:empty", "s", np.array([], dtype=np.int64))
    with pytest.raises(ValueError, match=r"'weight' must be an array \(3,\), not \(2,\)"):
        Document("s:short", "s", np.arange(3), {"weight": np.ones(2)})
    with pytest.raises(ValueError, match=r"'test_teacher' must be an array \(3, 2\)"):
        Document("s:flat", "s", np.arange(3), {"test_teacher": np.ones(3)})


def test_the_first_token_is_never_trained():
    document = Document("s:a", "s", np.arange(3), {"weight": np.array([1.0, 0.0, 2.0])})
    assert document.trained.tolist() == [False, False, True]
    assert document.trained_tokens == 1
    assert Document("s:b", "s", np.arange(3)).trained_tokens == 0


def test_a_stream_has_one_meaning():
    assert define_stream("test_experts", "int64", fill=7) is not None
    assert stream("test_experts") == EXPERTS
    with pytest.raises(ValueError, match="'test_experts' is defined already"):
        define_stream("test_experts", "float32")
    with pytest.raises(KeyError):
        stream("test_never_defined")
