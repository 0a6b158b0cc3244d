"""Sinks: where metrics and events go besides the run directory. The component of the kind ``sinks``.

A sink works in a process of its own (:mod:`postlude.telemetry.tracking`), which follows the run directory: so whatever
a sink does costs no step, and what it was told once it is not told again, whatever was killed. Another tracker is a
class of some twenty lines in a package of one's own, registered like any component.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from postlude import storage
from postlude.errors import UserError
from postlude.manifest.component import Component
from postlude.manifest.lock import read_lock
from postlude.runs import LINEAGE, Run, artifact_digest
from postlude.storage import exact_json
from postlude.telemetry.events import Event


@dataclass(frozen=True)
class Artifact:
    """What a stage has made."""

    uri: str
    sha256: str
    """Of its content, as the lineage of what is made from it names it."""
    lineage: Mapping[str, Any]
    """What ``lineage.json`` says: the artifacts, models and data that it comes from."""


class OpenSink:
    """A sink at work for one stage. What a sink has no use for, it leaves as it is here.

    Whatever it raises, it is closed, opened anew after a while, and told again from where it was last flushed.
    """

    goes_back: ClassVar[bool] = False
    """Whether it can forget steps. It then gets each step at once, and is told to go back where the stage does; others
    get what a checkpoint has committed."""

    def begin(self, after: int) -> int:
        """Called before anything else: steps up to ``after`` are known to be there. The last step that really is,
        where it can be asked. One that ``goes_back`` forgets those behind, and is called again whenever it has to."""
        return after

    def metrics(self, line: Mapping[str, Any]) -> None:
        """The metrics of one step, as in ``metrics.jsonl``, and its ``time`` in seconds since 1970. Each step comes
        once, in order."""

    def event(self, event: Event) -> None:
        """Something that happened in the stage."""

    def reading(self, line: Mapping[str, Any]) -> None:
        """What was read of one worker at one moment, as in ``readings.jsonl``, with the ``moment`` in seconds since
        1970. A resume repeats steps here."""

    def artifact(self, artifact: Artifact) -> None:
        """The stage is done, and has made this."""

    def flush(self) -> None:
        """Return when all that was told is there for good."""

    def close(self) -> None:
        """The stage ended or stops for now."""


class Sink(Component):
    """Its fields are keys of the manifest. With others than before it is another sink, which is told everything."""

    extra: ClassVar[str] = ""
    """The extra of the package that brings ``needs``."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Modules that are imported once the sink is opened."""

    def check(self, run_uri: str) -> None:
        """UserError if it cannot work on this machine: then the run does not start."""
        for module in self.needs:
            if not _is_installed(module):
                raise UserError(
                    f"The sink '{self.component_name}' needs the package '{module}', which is not installed here. "
                    f"Install it with: pip install 'postlude[{self.extra}]'."
                )

    def open(self, run_uri: str, stage: str) -> OpenSink:
        """Begin to take what a stage tells. It is called in the process of the sinks, in a thread for each stage."""
        raise NotImplementedError


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even what it is in
        return False


def numbers_of(reading: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a reading by name, those of phases and links as ``seconds.NAME`` and ``link.NAME``."""
    left = {name: value for name, value in reading.items() if name not in ("time", "moment", "rank", "host")}
    return dict(_leaves(left, ""))


@dataclass(frozen=True)
class Description:
    """What trackers are told of a stage as a whole."""

    run: str
    run_uri: str
    stage: str
    revision: int
    fingerprint: str | None
    config: Mapping[str, Any]
    """What the locked manifest says of the stage, without secrets."""

    @property
    def title(self) -> str:
        """Its name among the runs of a tracker."""
        return f"{self.run}/{self.stage}" + (f" ({self.revision})" if self.revision > 1 else "")

    @property
    def parameters(self) -> dict[str, Any]:
        """What the manifest says of it, by dotted key."""
        return dict(_leaves(self.config, ""))

    @property
    def key(self) -> str:
        """What no other stage of any run has, and no other revision."""
        return f"{self.run_uri}/{self.stage}/{self.revision}"


def _leaves(part: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(part, Mapping):
        for name, item in part.items():
            yield from _leaves(item, f"{key}.{name}" if key else str(name))
    elif part is not None:
        yield key, part


def describe(run_uri: str, stage: str) -> Description:
    """What is known of a stage that has begun."""
    run = Run(run_uri)
    identity = run.stage(stage).identity()
    locked = read_lock(run.read_manifest_lock() or "", run.manifest_lock).manifest if run.exists() else {}
    of_stage = locked.get("stages", {}).get(stage, {})
    if identity is None:
        return Description(run.name, run.uri, stage, 1, None, of_stage)
    return Description(run.name, run.uri, stage, identity.revision, identity.fingerprint, of_stage)


def artifact_of(run_uri: str, stage: str) -> Artifact | None:
    """What a stage has made; None where nothing is there."""
    place = Run(run_uri).stage(stage).artifact
    if not storage.is_committed(place):
        return None
    lineage = exact_json.load(storage.read_committed(place, LINEAGE))
    return Artifact(place, artifact_digest(place), lineage)


def local_folder(sink: Sink, given: str | None, run_uri: str, name: str, key: str = "folder") -> str:
    """The place of a sink that writes files: what its ``key`` gives, or ``name`` in the run. UserError where that is
    not local."""
    folder = given or storage.join(run_uri, name)
    if not storage.has_path(folder):
        raise UserError(
            f"The sink '{sink.component_name}' adds to files and cannot write to '{folder}'. "
            f"Give its key '{key}' a local path that is not encrypted."
        )
    return storage.local_path(folder)
