"""Data keys: which one a file is encrypted with, and the record, ``KEYS``, that holds it, wrapped by the master key.

A data key is for a folder: one that is committed as a whole (a checkpoint, an artifact), the folder of a stage, or that
of a run with what is in no stage. A file's is that of the nearest record above it. Whoever writes first where there
should be a record makes it, create-only, so that of several processes all use the same; each of them has the key
unwrapped once.

The master key is always the one that the rule of a place names, never one that its record does: who can write there
could name his own.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from postlude.manifest.storage import is_below, plain
from postlude.storage import exact_json, guards, uris
from postlude.storage.envelope import DataKey, changed
from postlude.storage.errors import CorruptError, NotFound, StorageError
from postlude.storage.keys import RECORD, Context, rule_for, service_of
from postlude.storage.rules import Rule

_VERSION = 1
_STAGE = re.compile(r"(?P<folder>(?P<run>.+?)/(?:stages/(?P<stage>[^/]+)|revisions/(?P<revised>[^/]+)/\d+))(?:/.*)?")
"""Where the run directory's contract has the folder of a stage."""

Read = Callable[[str], bytes]
Create = Callable[[str, bytes], bool]


@dataclass(frozen=True)
class Record:
    """What stands beside what a data key encrypts."""

    id: bytes
    folder: str
    """The name of the committed folder that the key is for; empty for that of a stage or a run, which may move."""
    context: Context
    key: str
    """The master key, as it was named when it wrapped the data key: for people, and for wrapping anew."""
    wrapped: str

    def to_bytes(self) -> bytes:
        body = {"version": _VERSION, "id": self.id.hex(), "folder": self.folder, "context": dict(self.context)}
        return exact_json.dump({**body, "key": self.key, "wrapped": self.wrapped}, indent=2).encode() + b"\n"

    @staticmethod
    def read(uri: str, content: bytes) -> Record:
        """CorruptError, which names the record's place, for what is none."""
        try:
            body: dict[str, Any] = exact_json.load(content)
            version, identity, context = body["version"], bytes.fromhex(body["id"]), body["context"]
            texts = (body["folder"], body["key"], body["wrapped"], *context, *context.values())
            if version != _VERSION or len(identity) != 16 or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"version {version}")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise changed(uri, f"it is no record of a data key: {error}") from error
        return Record(identity, body["folder"], context, body["key"], body["wrapped"])

    def unwrap(self, folder: str, rule: Rule) -> DataKey:
        """The data key of the folder that this stands in. CorruptError for a record of another folder or run,
        StorageError where the rule's master key does not unwrap it."""
        place = uris.join(folder, RECORD)
        expected = context_of(folder, self.folder)
        if self.folder and not _is_named(uris.name(folder), self.folder):
            raise changed(place, f"it is of a folder named '{self.folder}': what stands there belongs elsewhere")
        if dict(self.context) != expected:
            said, here = (" of ".join(reversed(list(each.values()))) for each in (self.context, expected))
            raise CorruptError(
                f"'{place}' is of {said}, and stands where that of {here} should: what is encrypted there was put "
                "there from another run or stage, or the run was moved. Move it back, or, if you moved it, say so: "
                f"postlude keys rewrap {folder} --to '{rule.encrypt.key if rule.encrypt else self.key}'"
            )
        try:
            secret = service_of(_key_of(rule)).unwrap(self.wrapped, self.context, rule)
        except StorageError as error:
            raise StorageError(f"What is encrypted in '{folder}' cannot be read: {error}") from error
        return DataKey(self.id, secret, self.folder)

    def wrapped_anew(self, folder: str, old: Rule, new: Rule) -> Record:
        """The same data key, wrapped by another master key for the run and stage that the folder stands in now."""
        try:
            secret = service_of(_key_of(old)).unwrap(self.wrapped, self.context, old)
        except StorageError as error:
            raise StorageError(f"The data key of '{folder}' cannot be unwrapped: {error}") from error
        context = context_of(folder, self.folder)
        wrapped = service_of(_key_of(new)).wrap(secret, context, new)
        return replace(self, context=context, key=_key_of(new), wrapped=wrapped)


def context_of(folder: str, named: str = "") -> dict[str, str]:
    """The run and the stage that a folder is of, where that can be told from where it stands."""
    of_stage = _STAGE.fullmatch(plain(folder))
    if of_stage is None:
        return {"run": named or uris.name(plain(folder))}
    return {"run": uris.name(of_stage["run"]), "stage": of_stage["stage"] or of_stage["revised"]}


def _key_of(rule: Rule) -> str:
    assert rule.encrypt is not None
    return rule.encrypt.key


def _is_named(name: str, named: str) -> bool:
    """Whether a folder has the name that its record gives, or is about to get it."""
    return name == named or (name.startswith(".") and name.endswith(".unfinished"))


# --- the key of a file ----------------------------------------------------------------------------------------


_unwrapped: dict[tuple[str, bytes, Rule], DataKey] = {}
_places: dict[str, tuple[str, bytes]] = {}
"""Of remote folders that were read from: where their record is, and what it was."""
_turn = threading.RLock()


def _begin_anew() -> None:
    global _turn
    _turn = threading.RLock()  # a thread that is not in this child may have had it


os.register_at_fork(after_in_child=_begin_anew)


def key_to_read(uri: str, wanted: bytes, read: Read) -> tuple[DataKey, str]:
    """The data key of a file whose header names the key ``wanted``, and the file's path below the key's folder.
    CorruptError."""
    place, rule = _placed(uri)
    found = _places.get(uris.parent(place))
    if found is None or _id(found) != wanted:
        found = _find(place, rule, read)
    if found is None:
        raise changed(uri, f"there is no {RECORD} above it, which would hold its key")
    if _id(found) != wanted:
        raise changed(uri, f"it is encrypted with another data key than that of '{found[0]}'")
    if not uris.is_local(uri):
        _places[uris.parent(place)] = found
    return _unwrap(*found, rule), _below(place, found[0])


def _id(found: tuple[str, bytes]) -> bytes:
    folder, content = found
    return Record.read(uris.join(folder, RECORD), content).id


def key_to_write(uri: str, read: Read, create: Create) -> tuple[DataKey, str]:
    """The data key of a file that is about to be written, and the file's path below the key's folder. The key is made
    if there is none yet."""
    place, rule = _placed(uri)
    with _turn:
        found = _find(place, rule, read)
        if found is None:
            folder = _folder_for(place, rule)
            return _new_key(folder, "", rule, read, create), _below(place, folder)
        return _unwrap(*found, rule), _below(place, found[0])


def new_key(folder: str, named: str, read: Read, create: Create) -> DataKey:
    """Make the data key of a folder, which is going to be named so, unless it has one."""
    place, rule = _placed(folder)
    return _new_key(place, named, rule, read, create)


def _new_key(folder: str, named: str, rule: Rule, read: Read, create: Create) -> DataKey:
    context, place, identity = context_of(folder, named), uris.join(folder, RECORD), os.urandom(16)
    try:
        secret, wrapped = service_of(_key_of(rule)).generate(context, rule)
    except StorageError as error:
        raise StorageError(f"What is to be encrypted in '{folder}' cannot be written: {error}") from error
    record = Record(identity, named, context, _key_of(rule), wrapped)
    content = record.to_bytes()
    if not create(place, content):
        return _unwrap(folder, read(place), rule)
    _unwrapped[folder, content, rule] = key = DataKey(identity, secret, named)
    return key


def _unwrap(folder: str, content: bytes, rule: Rule) -> DataKey:
    """Once in a process."""
    with _turn:
        key = _unwrapped.get((folder, content, rule))
        if key is None:
            key = Record.read(uris.join(folder, RECORD), content).unwrap(folder, rule)
            _unwrapped[folder, content, rule] = key
        return key


def _placed(uri: str) -> tuple[str, Rule]:
    """The place of a file as its rule names places, and the rule."""
    place, rule = plain(uri), rule_for(uri)
    return (place if is_below(place, rule.prefix) else os.path.realpath(place)), rule


def _find(place: str, rule: Rule, read: Read) -> tuple[str, bytes] | None:
    """The nearest folder above a file that has a record, as far as the rule reaches, and the record."""
    of_stage = _STAGE.fullmatch(place)
    while (folder := uris.parent(place)) != place:
        try:
            return folder, read(uris.join(folder, RECORD))
        except NotFound:
            if (
                folder == rule.prefix
                or not is_below(folder, rule.prefix)
                or (of_stage and folder == of_stage["folder"])
            ):
                return None
        place = folder
    return None


def _folder_for(place: str, rule: Rule) -> str:
    """The folder that gets a record where there is none: of the stage, of the run that is held, or the file's own."""
    of_stage, guard = _STAGE.fullmatch(place), guards.guard_of(place)
    wished = of_stage["folder"] if of_stage else plain(guard.folder) if guard is not None else ""
    own = uris.parent(place)
    return wished if wished and is_below(own, wished) and is_below(wished, rule.prefix) else own


def _below(place: str, folder: str) -> str:
    return place.removeprefix(folder).lstrip("/")
