"""Writes under a condition that an object store decides, and what uploads to one leave behind."""

from __future__ import annotations

import logging
import secrets

from postlude.storage import encryption, files, guards, uris
from postlude.storage.errors import StorageError, writing
from postlude.storage.refusals import code_of

_UNKNOWN = ("NotImplemented", "501", "InvalidArgument", "InvalidRequest")
"""What stores say of a condition that they do not know, if they say anything."""

_log = logging.getLogger(__name__)


def require_exclusive(uri: str) -> None:
    """StorageError unless the store makes an object only where there is none, and replaces one only while it is what it
    was, as :func:`~postlude.storage.files.create` and :func:`swap` do: asked of its file system, and tried beside."""
    from fsspec import AbstractFileSystem

    filesystem, _ = files.remote(uri)
    looks_before = getattr(filesystem.pipe_file, "__func__", None) is AbstractFileSystem.pipe_file
    probe = f"{uri}.{secrets.token_hex(4)}{files.UNFINISHED}"
    try:
        if not looks_before and files.create(probe, b"1") and not files.create(probe, b"2"):
            tag = tag_of(probe)
            if tag is None or (swap(probe, b"3", tag) and swap(probe, b"4", tag) is None):
                return
    except StorageError as error:
        if code_of(error) not in _UNKNOWN:
            raise
    finally:
        files.remove(probe)
    raise StorageError(
        f"'{uris.parent(uri)}' is on a store that cannot make an object only where there is none, or replace one only "
        "while nobody else has (If-None-Match and If-Match), so that two processes could write to it at once. Choose a "
        "place that can: this machine, S3 or Google Cloud Storage; of another store see whether a newer version can."
    )


def swap(uri: str, content: bytes, tag: str | None) -> str | None:
    """Replace what a file of an object store holds, if it is still the one with this tag: its new tag, or None if it is
    another or gone. Elsewhere, or without a tag, it is replaced as :func:`~postlude.storage.files.write_bytes` does."""
    guards.check(uri)
    if uris.is_local(uri) or not files.is_object_store(files.remote(uri)[0]):
        files.write_bytes(uri, content)
        return ""
    filesystem, path = files.remote(uri)
    if encryption.is_encrypted(uri):
        content = encryption.seal(uri, content)
    with writing(uri):
        try:
            return filesystem.put_if(path, content, **({"IfMatch": tag} if tag else {}))
        except FileExistsError:
            return None


def tag_of(uri: str) -> str | None:
    """By which :func:`swap` knows a file; None where it needs none."""
    if uris.is_local(uri) or not files.is_object_store(files.remote(uri)[0]):
        return None
    return files.info(uri)["ETag"]


def abort_uploads(folder: str, lease: str) -> list[str]:
    """Abort what processes that are gone began to send below a folder of an object store in parts, before the file
    ``lease`` was written, by the clock of the store: the URIs that it was for. One that forbids it is told of."""
    filesystem, path = files.remote(folder)
    if not files.is_object_store(filesystem):
        return []
    try:
        with writing(folder):
            return [f"s3://{each}" for each in filesystem.abort_uploads(path, files.info(lease)["LastModified"])]
    except StorageError as error:
        _log.warning("Unfinished uploads below '%s' are left: %s", folder, error)
        return []
