"""Which files a path means, what each holds, and whether they are read at random or as a stream."""

from __future__ import annotations

import glob
from collections.abc import Sequence

from postlude import storage
from postlude.data.records import GroupAccess, RandomAccess, Records, digest
from postlude.data.sources.cache import make_once
from postlude.data.sources.compression import SUFFIXES, is_compressed, open_plain
from postlude.data.sources.indexed import Indexed
from postlude.data.sources.sequential import Sequential
from postlude.data.sources.tables import RowGroups, parquet_rows
from postlude.data.sources.text import layout_of
from postlude.errors import DataError
from postlude.nearest import suggestion

GROUP_ROWS = 4096
"""Rows of a group of a text file that is read as a stream."""
RANDOM_ACCESS_BYTES = 2 * 2**30
"""Up to so many bytes, local files are read at random; a compressed byte counts as :data:`_INFLATION`."""
_INFLATION = 4

_KINDS = {"jsonl": "jsonl", "ndjson": "jsonl", "json": "json", "parquet": "parquet", "csv": "csv", "tsv": "tsv"}


def open_files(paths: Sequence[str], stream: bool | None, cache: str) -> Records:
    """The records of files, folders and patterns. ``stream``: in groups, or single rows; None chooses by their size.

    DataError if something is missing, of no known kind, or if all of it holds no record.
    """
    uris = [uri for path in paths for uri in find_files(path)]
    if stream is None:
        weights = (
            storage.size_bytes(uri) * (_INFLATION if is_compressed(uri) or _kind_of(uri) == "parquet" else 1)
            for uri in uris
        )
        stream = not all(map(storage.is_local, uris)) or sum(weights) > RANDOM_ACCESS_BYTES
    parts = [_open(uri, stream, cache) for uri in uris]
    if not any(part.rows for part in parts):
        what = f"'{uris[0]}' holds" if len(uris) == 1 else f"The {len(uris)} files of {', '.join(paths)} hold"
        raise DataError(f"{what} no record. Check the path, or how the data were written.")
    return GroupAccess(parts) if stream else RandomAccess(parts)


def find_files(path: str) -> list[str]:
    """The data files that a path means: itself, what a pattern matches, or all those below a folder, sorted."""
    if storage.is_directory(path):
        uris = []
        for uri in storage.expand(storage.join(glob.escape(path), "**")):
            is_hidden = any(part.startswith((".", "_")) for part in uri.removeprefix(path).split("/"))
            if _kind_of(uri) and not storage.is_directory(uri) and not is_hidden:
                uris.append(uri)
        if not uris:
            raise DataError(f"The folder '{path}' holds no data file: none ends in {_endings()}.")
        return uris
    uris = match_files(path)
    unknown = next((uri for uri in uris if not _kind_of(uri)), None)
    if unknown is not None:
        raise DataError(
            f"'{unknown}' is of no kind that is known: its name should end in {_endings()}. Raw files of other kinds "
            "are read by the source 'query', under 'tables'."
        )
    return uris


def match_files(path: str) -> list[str]:
    """The files that a name or a pattern means, of whatever kind, sorted. DataError if there is none."""
    uris = [uri for uri in storage.expand(path) if not storage.is_directory(uri)]
    if uris:
        return uris
    if glob.has_magic(path):
        raise DataError(f"No file matches the pattern '{path}'. Check it, and the folder that it starts from.")
    beside = storage.list_directory(storage.parent(path))
    hint = suggestion(storage.name(path), beside) or " Check the path."
    raise DataError(f"There is no file '{path}'.{hint}")


def file_fingerprint(uri: str) -> str:
    """Changes when the file does."""
    return digest(storage.name(uri), storage.modified_fingerprint(uri))


def _open(uri: str, stream: bool, cache: str) -> Records:
    fingerprint = file_fingerprint(uri)
    kind = _kind_of(uri)
    assert kind is not None
    if kind == "parquet":
        return RowGroups(uri, fingerprint) if stream else parquet_rows(uri, fingerprint, cache)
    with open_plain(uri) as file:
        layout = layout_of(uri, kind, file)
    if stream and is_compressed(uri):
        return Sequential(uri, layout, cache, GROUP_ROWS, fingerprint)
    plain = uri if stream or (storage.is_local(uri) and not is_compressed(uri)) else local_copy(uri, fingerprint, cache)
    return Indexed(plain, layout, cache, GROUP_ROWS if stream else None, uri, fingerprint)


def local_copy(uri: str, fingerprint: str, cache: str) -> str:
    """The path of a copy of a file on this machine, decompressed."""

    def copy(path: str) -> None:
        with open_plain(uri) as source, open(path, "wb") as target:
            while chunk := source.read(2**20):
                target.write(chunk)

    return make_once(cache, f"copy-{digest(uri, fingerprint)}", copy)


def _kind_of(uri: str) -> str | None:
    stem, is_packed = uri.lower(), False
    for suffix in SUFFIXES:
        stem, is_packed = stem.removesuffix(suffix), is_packed or stem.endswith(suffix)
    kind = _KINDS.get(storage.name(stem).rpartition(".")[2])
    return None if kind == "parquet" and is_packed else kind


def _endings() -> str:
    return ", ".join(f".{ending}" for ending in _KINDS) + f" (text also with {' or '.join(SUFFIXES)})"
