"""A run directory as a whole: the manifest lock, the events, the stages, and who works on it."""

from __future__ import annotations

import hashlib
import os

from postlude import storage
from postlude.manifest.lock import ANEW
from postlude.runs.schemas import EventLine
from postlude.runs.stage import Stage


class Run:
    """The run behind a URI, whether it has begun or not: making this object writes nothing."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.name = storage.name(uri)
        self.events = storage.Journal(storage.join(uri, "events.jsonl"), EventLine)
        self.manifest_lock = storage.join(uri, "manifest.lock.yaml")
        """The URI of the manifest lock, the file that makes a folder a run."""
        self.output = storage.join(uri, "output.log")
        """The URI of what a detached run on this machine prints."""
        self._holding = storage.join(uri, "run.lock")

    # --- the manifest lock ----------------------------------------------------------------------------------

    def exists(self) -> bool:
        """Whether the run has begun."""
        return storage.exists(self.manifest_lock)

    def read_manifest_lock(self) -> str | None:
        """The text of the manifest lock; None if the run has not begun. CorruptError if it is damaged."""
        return storage.read_sealed_text(self.manifest_lock, ANEW) if self.exists() else None

    def write_manifest_lock(self, text: str) -> None:
        """Replace the manifest lock, atomically. Only the holder of the run may."""
        storage.write_sealed_text(self.manifest_lock, text)

    # --- one process at a time ------------------------------------------------------------------------------

    def hold(self) -> storage.Lock:
        """Take the run for this process, until it releases it or ends: nothing is written in it by a process that has
        lost it. LockedError if another process has it."""
        return storage.lock(self._holding, guarded_folder=self.uri)

    def holder(self) -> storage.Holder | None:
        """The process that works on the run at this moment."""
        return storage.holder(self._holding)

    # --- stages ---------------------------------------------------------------------------------------------

    def stage(self, name: str) -> Stage:
        """The stage of that name, whether it has begun or not."""
        return Stage(storage.join(self.uri, "stages", name), name, is_held=lambda: self.holder() is not None)

    def stages(self) -> list[Stage]:
        """The stages that have begun, in the order in which they did."""
        begun = [self.stage(name) for name in storage.list_directory(storage.join(self.uri, "stages"))]
        return sorted(begun, key=lambda stage: (stage.status().begun_at or "~", stage.name))

    # --- a place on this machine ----------------------------------------------------------------------------

    @property
    def cache(self) -> str:
        """A local folder for what can be made again: in the run if that is local, else in the user's cache."""
        if storage.is_local(self.uri):
            return storage.join(storage.local_path(self.uri), "cache")
        above = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        cache = os.path.join(above, "postlude", hashlib.sha256(self.uri.encode()).hexdigest()[:16])
        if storage.is_encrypted(self.uri) and not storage.is_encrypted(cache):
            raise storage.StorageError(
                f"The run at '{self.uri}' is encrypted, and what this machine keeps of it is not. Give "
                f"'{os.path.join(above, 'postlude')}/' a key under 'storage' as well."
            )
        return cache
