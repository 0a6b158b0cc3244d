"""Streams that a frozen model computed beforehand: written in files of their own, looked up by document.

Notable:

- Only the values of trained tokens are kept.
- A document is known by all that its values follow from: its tokens, and which of them are trained. So one that comes
  twice has the same values, and one that is not what it was when they were computed is not found, rather than given
  those of another.
- A part is one file in Arrow's IPC format with a row for each document, there whole or not at all, with its digest in
  its name. The folder of the parts is committed when all of them stand.
- Values stay in the files, which are mapped into memory; the index takes 16 bytes a document.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from postlude import storage
from postlude.data.document import Block, Document, Unit, stream
from postlude.errors import DataError

if TYPE_CHECKING:
    import pyarrow

Values = Mapping[str, np.ndarray]
"""The values of one document by stream, [trained, *width] each."""

KEY_BYTES = 16
_OPEN_FILES = 64
"""So many parts are kept open: as many as a step reads from in turn, and fewer than a process may open."""

_PART = re.compile(r"part-(\d+)(?:-[0-9a-f]{16})?\.arrow")


def document_key(document: Document) -> bytes:
    """16 bytes that stand for a document's tokens and for which of them are trained."""
    key = hashlib.blake2b(digest_size=KEY_BYTES)
    key.update(len(document).to_bytes(8, "little"))
    key.update(document.tokens.astype("<i8").tobytes())
    key.update(np.packbits(document.trained).tobytes())
    return key.digest()


def with_values(document: Document, values: Values) -> Document:
    """The document with these values at its trained tokens, and the streams' fill elsewhere."""
    trained = document.trained
    added = {}
    for name, kept in values.items():
        kind = stream(name)
        row = np.full((len(document), *kind.width), kind.fill, kind.dtype)
        row[trained] = kept
        added[name] = row
    return replace(document, streams={**document.streams, **added})


class AnnotationFiles:
    """The files of one pass, in a folder that is committed last. ``streams`` names what is stored."""

    def __init__(self, uri: str, streams: Sequence[str]) -> None:
        self.uri, self.streams = uri, tuple(streams)

    def done(self) -> set[int]:
        """The numbers of the parts that stand, and hold what their names say."""
        uris = {number: storage.join(self.uri, name) for number, name in _names(self.uri).items()}
        return {number for number, uri in uris.items() if storage.is_as_named(uri)}

    def write(self, number: int, documents: Sequence[Document], values: Sequence[Values]) -> None:
        """Write a part, atomically; what stood in its place goes."""
        before = _names(self.uri).get(number)
        written = storage.write_once(
            storage.join(self.uri, f"part-{number:08d}.arrow"), self._to_bytes(documents, values)
        )
        if before is not None and before != storage.name(written):
            storage.remove(storage.join(self.uri, before))

    def digests(self, numbers: Iterable[int]) -> dict[str, storage.Digest]:
        """What parts that stand are, by name, read again."""
        names = _names(self.uri)
        uris = {names[number]: storage.join(self.uri, names[number]) for number in numbers}
        return {name: storage.Digest(storage.size_bytes(uri), storage.sha256_of(uri)) for name, uri in uris.items()}

    def commit(self, digests: Mapping[str, storage.Digest]) -> None:
        """Say that these parts are all there are."""
        storage.commit(self.uri, digests)

    def _to_bytes(self, documents: Sequence[Document], values: Sequence[Values]) -> bytes:
        import pyarrow as pa

        columns = {
            "example_id": pa.array([document.example_id for document in documents], pa.string()),
            "key": pa.array([document_key(document) for document in documents], pa.binary(KEY_BYTES)),
        }
        lengths = [document.trained_tokens for document in documents]
        for name in self.streams:
            kind = stream(name)
            flat = [np.ascontiguousarray(own[name], kind.dtype).reshape(-1) for own in values]
            numbers = pa.array(np.concatenate([np.empty(0, kind.dtype), *flat]))
            offsets = np.cumsum([0, *lengths], dtype=np.int64) * int(np.prod(kind.width, dtype=np.int64))
            columns[name] = pa.LargeListArray.from_arrays(pa.array(offsets), numbers)
        batch = pa.RecordBatch.from_pydict(columns)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, batch.schema) as file:
            file.write_batch(batch)
        return sink.getvalue().to_pybytes()


class StoredStreams:
    """What a finished pass has stored, in a local folder. ``of`` says in an error whose values they are."""

    def __init__(self, folder: str, streams: Sequence[str], of: str) -> None:
        self.streams, self._of = tuple(streams), of
        self._folder = folder
        self._batch = lru_cache(_OPEN_FILES)(self._open)
        hashes, places = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)]
        self._names = _names(folder)
        for number in self._names:
            keys = _keys(self._open(number))
            hashes.append(keys[:, 0].copy())
            places.append(np.arange(len(keys), dtype=np.uint64) | np.uint64(number << 32))
        hash_of_row, place_of_row = np.concatenate(hashes), np.concatenate(places)
        order = np.argsort(hash_of_row, kind="stable")  # of documents stored twice the first counts, on every rank
        self._hashes, self._places = hash_of_row[order], place_of_row[order]

    def __len__(self) -> int:
        """How many documents are stored."""
        return len(self._hashes)

    def complete(self, block: Block) -> Block:
        """The block with the streams of each document. DataError if one is not stored."""
        return tuple(Unit(tuple(self.annotate(document) for document in unit.documents)) for unit in block)

    def annotate(self, document: Document) -> Document:
        """The document with its streams; one without trained tokens stays as it is. DataError if it is not stored."""
        if not document.trained.any():
            return document
        key = document_key(document)
        (wanted, _) = np.frombuffer(key, "<u8")
        place = int(np.searchsorted(self._hashes, wanted))
        while place < len(self._hashes) and self._hashes[place] == wanted:
            part, row = divmod(int(self._places[place]), 1 << 32)
            batch = self._batch(part)
            if _keys(batch)[row].tobytes() == key:
                return with_values(document, {name: _values(batch, name, row) for name in self.streams})
            place += 1
        raise DataError(
            f"The example '{document.example_id}' is not as it was when the {self._of} was run over the data: what was "
            "stored has nothing for it. Put the data back as they were, or begin the stage anew."
        )

    def _open(self, number: int) -> pyarrow.RecordBatch:
        import pyarrow as pa

        path = storage.clear_path(storage.join(self._folder, self._names[number]))
        return pa.ipc.open_file(pa.memory_map(path)).get_batch(0)


def _names(uri: str) -> dict[int, str]:
    """The names of the parts in a folder by their numbers, in order."""
    matches = filter(None, map(_PART.fullmatch, storage.list_directory(uri)))
    return {int(match[1]): match[0] for match in matches}


def _keys(batch: pyarrow.RecordBatch) -> np.ndarray:
    """[documents, 2] uint64: the keys of a part, where they lie."""
    _, keys = batch.column("key").buffers()
    return np.empty((0, 2), "<u8") if not len(batch) else np.frombuffer(keys, "<u8", 2 * len(batch)).reshape(-1, 2)


def _values(batch: pyarrow.RecordBatch, name: str, row: int) -> np.ndarray:
    """[trained, *width] of one document, where they lie."""
    return batch.column(name)[row].values.to_numpy().reshape(-1, *stream(name).width)
