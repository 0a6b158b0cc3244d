"""Stored streams: what is written comes back at the trained tokens of the very document, and of no other."""

from __future__ import annotations

import numpy as np
import pytest

from postlude import storage
from postlude.data import annotations
from postlude.data.annotations import AnnotationFiles, StoredStreams, document_key
from postlude.data.document import REFERENCE_LOGP, WEIGHT, Document, Unit, define_stream
from postlude.errors import DataError

WIDE = define_stream("stored_test_pairs", "int32", fill=-7, width=(2,))
STREAMS = (REFERENCE_LOGP.name, WIDE.name)


def document(number: int, trained: tuple[int, ...] = (0, 1, 1, 0, 1)) -> Document:
    tokens = np.arange(5) + 10 * number
    return Document(f"chats:{number}", "chats", tokens, {WEIGHT.name: np.array(trained, np.float32)})


def values(document: Document) -> dict[str, np.ndarray]:
    own = document.tokens[document.trained]
    return {STREAMS[0]: -own.astype(np.float32), STREAMS[1]: np.stack([own, own + 1], 1).astype(np.int32)}


def stored(folder, parts: list[list[Document]]) -> StoredStreams:
    files = AnnotationFiles(str(folder), STREAMS)
    for number, documents in enumerate(parts):
        files.write(number, documents, [values(one) for one in documents])
    files.commit(files.digests(files.done()))
    storage.verify(str(folder))
    return StoredStreams(str(folder), STREAMS, "reference")


def test_values_stand_at_trained_tokens_and_the_fill_elsewhere(tmp_path):
    documents = [document(number) for number in range(9)]
    found = stored(tmp_path / "parts", [documents[:4], [], documents[4:]])
    assert len(found) == 9
    for one in documents:
        streams = found.annotate(one).streams
        assert streams[STREAMS[0]].tolist() == [0, -one.tokens[1], -one.tokens[2], 0, -one.tokens[4]]
        assert streams[STREAMS[1]][[0, 3]].tolist() == [[-7, -7], [-7, -7]]
        assert streams[STREAMS[1]][4].tolist() == [one.tokens[4], one.tokens[4] + 1]
        assert streams[WEIGHT.name] is one.streams[WEIGHT.name]


def test_a_block_keeps_its_units(tmp_path):
    pair = Unit((document(1), document(2)))
    found = stored(tmp_path / "parts", [list(pair.documents)])
    ((first, second),) = [unit.documents for unit in found.complete((pair,))]
    assert (first.example_id, second.example_id) == ("chats:1", "chats:2")
    assert first.streams[STREAMS[0]][1] != second.streams[STREAMS[0]][1]


def test_a_document_without_trained_tokens_has_nothing_stored(tmp_path):
    found = stored(tmp_path / "parts", [[document(1)]])
    silent = document(5, (0, 0, 0, 0, 0))
    assert found.annotate(silent) is silent


@pytest.mark.parametrize("other", [document(2), document(1, (0, 1, 0, 1, 1))], ids=["tokens", "mask"])
def test_another_document_is_not_given_what_was_said_of_this_one(tmp_path, other):
    found = stored(tmp_path / "parts", [[document(1)]])
    with pytest.raises(DataError, match=f"{other.example_id}' is not as it was when the reference was run"):
        found.annotate(other)


def test_documents_with_one_hash_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(annotations, "document_key", lambda one: bytes(8) + document_key(one)[8:])
    documents = [document(number) for number in range(6)]
    found = stored(tmp_path / "parts", [documents[:3], documents[3:]])
    for one in documents:
        assert found.annotate(one).streams[STREAMS[0]][1] == -one.tokens[1]
    with pytest.raises(DataError):
        found.annotate(document(7))


def test_of_a_document_stored_twice_the_first_counts(tmp_path):
    files = AnnotationFiles(str(tmp_path / "parts"), STREAMS)
    one = document(3)
    for number in (1, 0):
        files.write(number, [one], [{name: value + number for name, value in values(one).items()}])
    found = StoredStreams(str(tmp_path / "parts"), STREAMS, "reference")
    assert found.annotate(one).streams[STREAMS[0]][1] == -one.tokens[1]


def test_more_parts_than_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr(annotations, "_OPEN_FILES", 2)
    documents = [document(number) for number in range(12)]
    found = stored(tmp_path / "parts", [[one] for one in documents])
    for one in [*documents, *documents]:
        assert found.annotate(one).streams[STREAMS[1]][1, 1] == one.tokens[1] + 1
