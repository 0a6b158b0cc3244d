"""Whole folders of files that other libraries read and write by path: committed to a URI, and fetched from one."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from postlude.storage import commits, encryption, files, guards
from postlude.storage.errors import CorruptError, NotFound, writing, writing_below
from postlude.storage.scratch import memory_folder, scratch_folder


@contextmanager
def new_folder(uri: str, extra: Mapping[str, Any] | None = None) -> Iterator[str]:
    """A local folder to write into, which replaces the folder ``uri`` when the block ends without an error.

    It is committed, with ``extra`` in the marker, before it has its name; so there is no moment at which part of
    it stands there. After an error or a kill nothing does. ``extra`` is read when the block ends. What is going to be
    encrypted is written in memory.
    """
    is_encrypted = encryption.is_encrypted(uri)
    if files.is_local(uri):
        path = files.local_path(uri)
        above, base = files.parent(path), files.name(path)
        work, retired = (os.path.join(above, files.unfinished_name(base, role)) for role in ("new", "old"))
        commits.begin(work, base)
        try:
            if is_encrypted:
                with memory_folder("new") as above_it:
                    folder = os.path.join(above_it, "content")
                    os.mkdir(folder)
                    yield folder
                    digests = {below: _upload(folder, work, below) for below in files.files_below(folder)}
            else:
                with writing_below(uri):
                    yield work
                digests = {below: _settle(work, below) for below in files.files_below(work)}
            commits.commit(work, digests, extra)
            guards.check(uri, now=True)
            with writing(uri):
                files.remove(retired)
                if os.path.exists(path):
                    os.rename(path, retired)
                os.rename(work, path)
                files.sync_folder(above)
        finally:
            files.remove(work)
            files.remove(retired)
    else:
        with folder_for_copy(uri, "new") as folder:
            work = os.path.join(folder, "content")
            os.mkdir(work)
            with writing_below(work):
                yield work
            commits.begin(uri)
            commits.commit(uri, {below: _upload(work, uri, below) for below in files.files_below(work)}, extra)


def fetch(uri: str, into: str) -> str:
    """The local path of a folder: its own, or ``into``, where a committed remote folder is copied unless it is there
    as it was committed.

    CorruptError if what arrives is not what was committed.
    """
    if files.is_local(uri):
        return files.local_path(uri)
    if not _is_copy(into, commits.read_marker(uri)):
        copy_folder(uri, into)
    return into


def has_path(uri: str) -> bool:
    """Whether other libraries can read what stands there by its path: it is local, and in clear."""
    return files.is_local(uri) and not encryption.is_encrypted(uri)


def folder_for_copy(uri: str, for_what: str) -> AbstractContextManager[str]:
    """A scratch folder for a clear copy of what stands there, or will: in memory where that is encrypted."""
    return memory_folder(for_what) if encryption.is_encrypted(uri) else scratch_folder(for_what)


_in_memory: dict[tuple[str, str], tuple[int, str]] = {}
"""Clear copies in memory of encrypted files, by place and fingerprint: descriptors and paths. They go with the
process."""
os.register_at_fork(after_in_child=_in_memory.clear)  # those of the parent have its number in their paths


def clear_path(uri: str) -> str:
    """A path by which other libraries can read, or map, a local file: its own or, of an encrypted one, that of a copy
    in memory, which no folder names and which any process of this user can open for as long as this one lives."""
    if has_path(uri):
        return files.local_path(uri)
    key = files.local_path(uri), files.modified_fingerprint(uri)
    if key not in _in_memory:
        descriptor = os.memfd_create("postlude", os.MFD_CLOEXEC)
        with files.open_file(uri) as source, open(descriptor, "wb", closefd=False) as file:
            shutil.copyfileobj(source, file, 2**20)
        _in_memory[key] = descriptor, f"/proc/{os.getpid()}/fd/{descriptor}"
    return _in_memory[key][1]


def _is_copy(uri: str, marker: commits.Marker) -> bool:
    try:
        return commits.verify(uri) == marker
    except (CorruptError, NotFound):
        return False


def copy_file(uri: str, target: str) -> None:
    """Copy a file; what was at ``target`` is replaced."""
    with files.open_file(uri) as source, files.open_file(target, "wb") as file:
        shutil.copyfileobj(source, file, 2**20)


def copy_folder(uri: str, target: str, bring: Callable[[str, str], None] = copy_file) -> None:
    """Copy a committed folder, which replaces the folder ``target`` when the copy is whole.

    ``bring`` brings each file; :func:`link_file` shares it. NotFound if nothing was committed at ``uri``, CorruptError
    if what arrives is not what was committed.
    """
    marker = commits.read_marker(uri)
    with new_folder(target, marker.extra) as work:
        for below in marker.files:
            bring(files.join(uri, below), files.join(work, below))
        commits.check(work, marker)


def link_file(uri: str, target: str) -> None:
    """Give a file that is never written again, as those of a committed folder, a second name, which replaces what had
    that name; a copy where there can be no link: behind remote URIs, between file systems, and where one of them is
    encrypted."""
    may_share = not encryption.is_encrypted(uri) and not encryption.is_encrypted(target)
    if files.is_local(uri) and files.is_local(target) and may_share:
        source, path = files.local_path(uri), files.local_path(target)
        with writing(target):
            guards.make_folders(os.path.dirname(path))
            files.remove(target)
            try:
                os.link(source, path)
            except OSError as error:
                if error.errno not in (errno.EXDEV, *files.NO_LINKS):
                    raise
            else:
                return
    copy_file(uri, target)


def _settle(folder: str, below: str) -> commits.Digest:
    """Make a file that was written by somebody else durable, and digest it."""
    path = os.path.join(folder, below)
    with writing(path), open(path, "rb") as file:
        os.fsync(file.fileno())
    return commits.Digest(files.size_bytes(path), commits.sha256_of(path))


def _upload(folder: str, uri: str, below: str) -> commits.Digest:
    with open(os.path.join(folder, below), "rb") as source, commits.open_hashed(files.join(uri, below)) as target:
        shutil.copyfileobj(source, target, 2**20)
    return target.digest
