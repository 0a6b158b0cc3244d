"""The runs of a folder at a glance, however many: their names, and of those that are shown a few facts each."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from postlude import storage
from postlude.errors import UserError
from postlude.manifest.lock import Lock, changed_keys, flat, read_lock
from postlude.runs import Run
from postlude.storage import NewerSchema
from postlude.telemetry import events
from postlude.telemetry.alarms import standing


@dataclass(frozen=True)
class Brief:
    """A run at a glance; no stage is read from its begin."""

    run: Run
    state: str
    """That of the first stage that is not done; ``damaged`` or ``newer`` where it cannot be told."""
    states: Mapping[str, str] = field(default_factory=dict)
    """Of every stage of its manifest."""
    stage: str | None = None
    """The one at work, or the last that was."""
    step: int | None = None
    progress: float | None = None
    """The share of that stage that is done."""
    loss: float | None = None
    checkpoint: int | None = None
    alarms: int = 0
    changed_at: str | None = None
    """When a stage last changed its state, or something happened; ISO 8601, UTC."""
    trouble: str | None = None
    """Why it cannot be told."""


REST = 20
"""Times as long as listing the folder took, the list is kept."""


class Overview:
    """A folder of runs; or one that is a run itself, and then holds that alone."""

    def __init__(self, folder: str) -> None:
        self.folder = folder.rstrip("/") or folder
        self.is_run = Run(self.folder).exists()
        self._locks: dict[str, tuple[str, Lock]] = {}
        """Those that were read, each with the fingerprint of its file."""
        self._names: list[str] = []
        self._kept_until = 0.0

    def names(self, search: str = "") -> list[str]:
        """The names of the runs that hold a text. NotFound if there is no such folder.

        In a remote folder what is no run is among them: to ask of each would be a request each.
        """
        if self.is_run:
            return [storage.name(self.folder)]
        begin = time.monotonic()
        if begin > self._kept_until:
            if not storage.is_directory(self.folder):
                raise storage.NotFound(f"There is no folder '{self.folder}'.")
            names, is_local = storage.list_directory(self.folder), storage.is_local(self.folder)
            self._names = [name for name in names if not is_local or self._run(name).exists()]
            now = time.monotonic()
            self._kept_until = now + REST * (now - begin)
        return [name for name in self._names if search.lower() in name.lower()]

    def find(self, name: str) -> Run | None:
        """The run of that name; None if there is none directly in the folder."""
        if self.is_run:
            return Run(self.folder) if name == storage.name(self.folder) else None
        is_name = bool(name) and name not in (".", "..") and not {"/", "\\", "\0"} & set(name)
        run = self._run(name)
        return run if is_name and run.exists() else None

    def brief(self, name: str) -> Brief | None:
        """A run at a glance; None if it is not there, or not any more."""
        run = self.find(name)
        if run is None:
            return None
        try:
            return self._brief(run)
        except storage.NotFound:
            return None
        except (UserError, OSError) as error:
            state = "newer" if isinstance(error, NewerSchema) else "damaged"
            return Brief(run, state, trouble=str(error))

    def differences(self, one: Run, other: Run) -> list[str]:
        """What the manifests of two runs do not share, one line a key. Errors of reading a manifest lock."""
        return changed_keys(flat(self._lock(one).manifest), flat(self._lock(other).manifest))

    def _run(self, name: str) -> Run:
        return Run(storage.join(self.folder, name))

    def _lock(self, run: Run) -> Lock:
        fingerprint = storage.modified_fingerprint(run.manifest_lock)
        known = self._locks.get(run.uri)
        if known is None or known[0] != fingerprint:
            known = fingerprint, read_lock(run.read_manifest_lock() or "", run.manifest_lock)
            self._locks[run.uri] = known
        return known[1]

    def _brief(self, run: Run) -> Brief:
        stages = {name: run.stage(name) for name in self._lock(run).stages}
        known = {name: stage.status() for name, stage in stages.items()}
        states = {name: status.state for name, status in known.items()}
        begun = [name for name, state in states.items() if state != "pending"]
        chosen = [name for name in begun if states[name] == "running"] or begun
        current = chosen[-1] if chosen else None
        line = (stages[current].metrics.last() or {}) if current else {}
        checkpoints = stages[current].checkpoints() if current else []
        happened = events.read(run.events)
        changes = [status.changed_at for status in known.values() if status.changed_at]
        return Brief(
            run,
            next((state for state in states.values() if state != "done"), "done"),
            states,
            current,
            line.get("step"),
            line.get("progress"),
            line.get("loss"),
            checkpoints[0].step if checkpoints else None,
            len(standing(happened)),
            max(changes + [event.time for event in happened[-1:]], default=None),
        )
