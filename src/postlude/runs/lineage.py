"""Where an artifact comes from: what ``lineage.json`` says of it, and the way back to base models and data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from postlude import storage
from postlude.manifest.lock import hash_of
from postlude.runs.find import list_runs
from postlude.runs.revisions import revisions
from postlude.runs.run import Run
from postlude.storage import exact_json

LINEAGE = "lineage.json"


def artifact_digest(artifact: str) -> str:
    """SHA-256 of what an artifact is, hexadecimal: the digests of its files but that of its lineage, which names the
    run. Read from the marker, the files themselves unread. NotFound if it was never committed."""
    files = storage.read_marker(artifact).files
    return hash_of({path: digest.sha256 for path, digest in files.items() if path != LINEAGE})


def provenance(run: Run, name: str) -> dict[str, Any]:
    """What the lineage of a stage's artifact says of its origin: fingerprint, revision, the artifacts that it was made
    of, and the files of models and data. Empty if it is not known what the stage was begun with."""
    stage = run.stage(name)
    identity = stage.identity()
    if identity is None:
        return {}
    parents = []
    for need, fingerprint in identity.inputs.items():
        digest = artifact_digest(run.stage(need).artifact)
        revision = identity.input_revisions.get(need, 1)
        parents.append({"stage": need, "fingerprint": fingerprint, "revision": revision, "artifact_sha256": digest})
    return {
        "fingerprint": stage.result_fingerprint(),
        "revision": identity.revision,
        "parents": parents,
        "files": {what: dict(contents) for what, contents in identity.files.items()},
    }


@dataclass(frozen=True)
class Ancestor:
    """An artifact on the way back, and those that it was made of."""

    stage: str
    run: str
    """The run that made it."""
    fingerprint: str | None
    revision: int
    artifact_sha256: str
    place: str | None
    """Where it stands; None if it is not there any more."""
    files: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """The files of base models and data that it was made of, by what they are and by URI, with their content."""
    parents: tuple[Ancestor, ...] = ()


def walk(run: Run, name: str) -> Ancestor | None:
    """The artifact of a stage with all that it comes from, as far back as there is a lineage; None if there is none.

    Each parent is found by its digest: among the stages of this run, its earlier revisions, and the other runs beside.
    """
    artifact = run.stage(name).artifact
    if not storage.is_committed(artifact):
        return None
    digest = artifact_digest(artifact)
    return _ancestor(run, {"stage": name, "artifact_sha256": digest}, artifact)


def _ancestor(run: Run, record: Mapping[str, Any], place: str | None) -> Ancestor:
    try:
        own = exact_json.load(storage.read_committed(place, LINEAGE)) if place else {}
    except storage.NotFound:
        own = {}
    return Ancestor(
        stage=own.get("stage", record["stage"]),
        run=own.get("run", run.name),
        fingerprint=own.get("fingerprint", record.get("fingerprint")),
        revision=own.get("revision", record.get("revision", 1)),
        artifact_sha256=record["artifact_sha256"],
        place=place,
        files=own.get("files", {}),
        parents=tuple(_ancestor(run, parent, place_of(run, parent)) for parent in own.get("parents", ())),
    )


def place_of(run: Run, parent: Mapping[str, Any]) -> str | None:
    """Where the artifact stands that a lineage in a run names among its parents; None if it is not there any more."""
    for place in filter(storage.is_committed, _candidates(run, parent["stage"])):
        with suppress(storage.CorruptError):  # its own stage tells of it
            if artifact_digest(place) == parent["artifact_sha256"]:
                return place
    return None


def _candidates(run: Run, name: str) -> Iterator[str]:
    yield run.stage(name).artifact
    yield from (earlier.artifact for earlier in reversed(revisions(run, name)))
    for other in list_runs(storage.parent(run.uri)):
        yield other.stage(name).artifact
