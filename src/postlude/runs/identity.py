"""What a stage was begun with, and whether that is still so: ``stages/STAGE/identity.json``.

It is written before the stage makes its first step and says everything that the result follows from. Two stages with
one fingerprint have one result, whichever run they are in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from postlude import storage
from postlude.manifest.lock import changed_keys, hash_of
from postlude.secrecy import kept, stripped_all

REMEDY = "`postlude run` with the manifest that the stage was begun with writes it anew."


@dataclass(frozen=True)
class Identity:
    """All that the result of a stage follows from."""

    config: Mapping[str, Any] = field(default_factory=dict)
    """What the manifest says, by dotted key, without what cannot change the result."""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """The stages that it needs, each with the fingerprint of its result."""
    files: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """The content of the files that it reads, by what they are to it (``data.chats``, ``model``) and by URI."""
    code: Mapping[str, str] = field(default_factory=dict)
    """The version of the recipe, and a hash of every component that another package brings."""
    input_revisions: Mapping[str, int] = field(default_factory=dict)
    """Which revision of each stage that it needs. Not in the fingerprint: it counts within one run."""
    revision: int = 1
    """How many times the stage was begun from nothing in its run; not in the fingerprint either."""
    stamps: Mapping[str, str] = field(default_factory=dict)
    """Size and time of each file when its content was read, so that it is not read again."""
    day: str | None = None
    """The day that its chat templates are told, as 2026-01-31, where one writes the date; None too for a stage that a
    version began that did not note it."""
    taken_over_from: str | None = None
    """The run that made what stands here, where it was not this one."""

    @property
    def fingerprint(self) -> str:
        """SHA-256, hexadecimal. A file counts with its name and content, not with the folder that it lies in."""
        files = {
            what: [[storage.name(uri), content] for uri, content in contents.items()]
            for what, contents in self.files.items()
        }
        parts: dict[str, Any] = {
            "config": dict(self.config),
            "inputs": dict(self.inputs),
            "files": files,
            "code": dict(self.code),
        }
        return hash_of(parts if self.day is None else {**parts, "day": self.day})

    def result_fingerprint(self, amendments: Sequence[Sequence[Any]] = ()) -> str:
        """What the result follows from: the fingerprint, and the amendments that were made to the running stage."""
        return hash_of([self.fingerprint, list(amendments)]) if amendments else self.fingerprint

    def changes(self, now: Identity) -> list[str]:
        """Why what stands is not what ``now`` would make, one line for each cause; empty if it is.

        Keys come first, as ``KEY: OLD -> NEW``; what comes from inputs is :meth:`changed_inputs`.
        """
        days = [f"today: {self.day} -> {now.day}"] if self.day != now.day else []
        # Before there was `kept`, secrets stood in what was written.
        config = changed_keys(kept(self.config), now.config)
        return config + days + self._changed_files(now) + self._changed_code(now)

    def changed_inputs(self, now: Identity) -> list[str]:
        """The stages it needs that are not what they were: another result, or a later revision in this run."""
        return [
            name
            for name, result in now.inputs.items()
            if name in self.inputs
            and (self.inputs[name] != result or self.input_revisions.get(name) != now.input_revisions.get(name))
        ]  # what it did not need before is told by the key that names it

    def _changed_files(self, now: Identity) -> list[str]:
        causes = []
        for what in dict.fromkeys([*self.files, *now.files]):
            before, after = self.files.get(what), now.files.get(what)
            before = before and {stripped_all(uri): content for uri, content in before.items()}
            if before is None or after is None or before == after:
                continue  # that files are read at all follows from a key, which tells it
            there = [storage.name(uri) for uri in after if uri in before and before[uri] != after[uri]]
            come = [storage.name(uri) for uri in after if uri not in before]
            gone = [storage.name(uri) for uri in before if uri not in after]
            parts = [("other content in", there), ("new", come), ("gone", gone)]
            changes = "; ".join(f"{how} {_first_few(names)}" for how, names in parts if names)
            causes.append(f"the files of {what} changed: {changes or 'another order'}")
        return causes

    def _changed_code(self, now: Identity) -> list[str]:
        return [
            f"{what} is another version: {self.code[what][:12]} -> {now.code[what][:12]}"
            for what in now.code
            if what in self.code and self.code[what] != now.code[what]
        ]

    def write(self, uri: str) -> None:
        """Write it as a file, atomically."""
        storage.write_document(uri, {"fingerprint": self.fingerprint, **asdict(self)})

    @staticmethod
    def read(uri: str) -> Identity | None:
        """What a file says; None if there is none. CorruptError if it is not what was written."""
        try:
            document = storage.read_document(uri, REMEDY)
        except storage.NotFound:
            return None
        try:
            fingerprint = document.pop("fingerprint")
            identity = Identity(**document)
            sound = identity.fingerprint == fingerprint
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise storage.damaged(uri, f"it is not what was written ({error})", REMEDY) from error
        if not sound:
            raise storage.damaged(uri, "its fingerprint does not fit its content", REMEDY)
        return identity


def _first_few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
