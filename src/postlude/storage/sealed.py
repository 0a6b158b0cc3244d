"""Files that are read again, each with a digest of what it holds: nothing that was cut, emptied or changed is believed.

Where the digest of a file stands:

- in a document that is replaced as a whole (state, identity): in it, under the key ``sha256``;
- in a text that people read (the manifest lock): in its last line, a comment;
- of a file that is written once (parts, portions, caches): in its name;
- in a folder: in its marker (:mod:`postlude.storage.commits`).

A file without one is an earlier version's and is believed. What does not match raises CorruptError, which names the
remedy that the reader gives.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from postlude.storage import encryption, exact_json, files, guards
from postlude.storage.commits import checksum, read_marker, sha256_of
from postlude.storage.errors import CorruptError, NotFound, writing
from postlude.storage.files import free_place

_KEY = "sha256"
_LAST_LINE = re.compile(rb"# sha256: (\w*)\n\Z")
_NAMED = re.compile(r"(.+)-([0-9a-f]{16})((?:\.\w+)?)")


def damaged(uri: str, why: str, remedy: str = "") -> CorruptError:
    """The error of a file that is not what was written."""
    return CorruptError(f"'{uri}' is damaged: {why}. {remedy}".rstrip())


# --- documents ------------------------------------------------------------------------------------------------


def write_document(uri: str, body: Mapping[str, Any]) -> None:
    """Replace a JSON document, atomically."""
    files.write_text(uri, exact_json.dump({**body, _KEY: checksum(body)}, indent=2) + "\n")


def read_document(uri: str, remedy: str = "") -> dict[str, Any]:
    """What was written. NotFound if there is nothing, CorruptError if it is damaged."""
    content = files.read_bytes(uri)
    try:
        body = exact_json.load(content)
        digest = body.pop(_KEY, None)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(uri, f"it is not what was written ({error})", remedy) from error
    if digest is not None and digest != checksum(body):
        raise damaged(uri, "its digest does not fit its content", remedy)
    return body


def write_sealed_text(uri: str, text: str) -> None:
    """Replace a text in which a line that begins with ``#`` says nothing, atomically."""
    files.write_text(uri, f"{text}# sha256: {hashlib.sha256(text.encode()).hexdigest()}\n")


def read_sealed_text(uri: str, remedy: str = "") -> str:
    """The text that was written. NotFound if there is nothing, CorruptError if it is damaged."""
    content = files.read_bytes(uri)
    last = _LAST_LINE.search(content)
    text = content[: last.start()] if last else content
    if last and last[1].decode(errors="replace") != hashlib.sha256(text).hexdigest():
        raise damaged(uri, "its digest does not fit its content", remedy)
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise damaged(uri, f"it is not text in UTF-8 ({error})", remedy) from error


def read_committed(uri: str, name: str) -> bytes:
    """The content of one file of a committed folder. NotFound if there is none, CorruptError if it is damaged."""
    place = files.join(uri, name)
    content = files.read_bytes(place)
    digest = read_marker(uri).files.get(name)
    if digest is None or digest.sha256 != hashlib.sha256(content).hexdigest():
        raise damaged(place, "its content is not what was committed")
    return content


# --- files that are written once ------------------------------------------------------------------------------


def name_with_digest(name: str, sha256: str) -> str:
    """``part.arrow`` as ``part-0123456789abcdef.arrow``."""
    stem, ending = os.path.splitext(name)
    return f"{stem}-{sha256[:16]}{ending}"


def plain_name(name: str) -> str:
    """The name without the digest, where it has one."""
    match = _NAMED.fullmatch(name)
    return match[1] + match[3] if match else name


def write_once(uri: str, content: bytes) -> str:
    """Write a file, atomically, and return its URI, with the digest in its name."""
    digest = hashlib.sha256(content).hexdigest()
    place = files.join(files.parent(uri), name_with_digest(files.name(uri), digest))
    files.write_bytes(place, content)
    return place


def is_as_named(uri: str) -> bool:
    """Whether a file holds what its name says; True where that says nothing, False where there is no such file, or an
    encrypted one that is damaged."""
    match = _NAMED.fullmatch(files.name(uri))
    try:
        return not match or sha256_of(uri).startswith(match[2])
    except (NotFound, CorruptError):
        return False


def whole_files(folder: str, ending: str = "") -> dict[str, str]:
    """The URIs of the files in a folder that hold what their names say, by their plain names. Others are left out."""
    found = {}
    for name in files.list_directory(folder):
        if name.endswith(ending) and is_as_named(files.join(folder, name)):
            found[plain_name(name)] = files.join(folder, name)
    return found


# --- what is damaged ------------------------------------------------------------------------------------------


def set_aside(uri: str) -> str:
    """Keep a damaged file under a name that nothing reads, and return its URI."""
    place = free_place(uri)
    if encryption.is_encrypted(uri):
        with suppress(CorruptError):  # what cannot be decrypted here cannot be there either
            files.write_bytes(place, files.read_bytes(uri))
            files.remove(uri)
            return place
    if files.is_local(uri):
        guards.check(uri, now=True)
        with writing(place):
            os.replace(files.local_path(uri), files.local_path(place))
    else:
        files.write_bytes(place, files.read_bytes(uri))
        files.remove(uri)
    return place
