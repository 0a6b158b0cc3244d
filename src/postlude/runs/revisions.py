"""Stages that move. What a stage made before it was begun anew stands under ``RUN/revisions/STAGE/0001/``; what another
run made with the same fingerprint is taken over, not made again: local files are linked, remote ones copied.

Kept are the artifact with its lineage, which stays that of the run that made it, metrics, losses by example and what
the stage was begun with; checkpoints and stored streams go.
Every function here may be killed at any moment and called again: until a revision stands whole, the stage is where it
was, and after that it is gone from there or counts as not begun.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace

from postlude import storage
from postlude.runs.account import EVENTS
from postlude.runs.find import list_runs
from postlude.runs.identity import Identity
from postlude.runs.run import Run
from postlude.runs.stage import Stage
from postlude.storage.errors import writing

_WHOLE = "revision.json"
"""Written last: without it a revision is a copy that was not finished."""


def revisions(run: Run, name: str) -> list[Stage]:
    """The earlier revisions of a stage, oldest first. Their names are ``STAGE (revision N)``."""
    above = storage.join(run.uri, "revisions", name)
    numbers = [entry for entry in storage.list_directory(above) if entry.isdecimal()]
    return [
        Stage(storage.join(above, number), f"{name} (revision {int(number)})")
        for number in numbers
        if storage.exists(storage.join(above, number, _WHOLE))
    ]


def revision_of(run: Run, name: str) -> int:
    """The number of what stands in a stage; of what it is going to make, if it has not begun. Counted from 1."""
    stage = run.stage(name)
    if stage.has_begun():
        identity, details = known_identity(stage), stage.status().details
        if identity is not None or "revision" in details:
            return identity.revision if identity else details["revision"]
    return 1 + max((int(storage.name(earlier.uri)) for earlier in revisions(run, name)), default=0)


def known_identity(stage: Stage) -> Identity | None:
    """What a stage was begun with; None also where the file that says it is damaged."""
    try:
        return stage.identity()
    except storage.CorruptError:
        return None


def set_aside(run: Run, name: str) -> int:
    """Move what stands in a stage to its revisions, and return that revision's number. The stage is then not begun."""
    stage, number = run.stage(name), revision_of(run, name)
    place = storage.join(run.uri, "revisions", name, f"{number:04d}")
    if not storage.exists(storage.join(place, _WHOLE)):
        stage.drop_checkpoints()
        stage.drop_annotations()
        if storage.is_local(run.uri):
            _rename(stage, place, number)
        else:
            _copy(stage, place)
            _finish(place, number)
    stage.clear()
    return number


def _rename(stage: Stage, place: str, number: int) -> None:
    """One rename moves all of it. The mark is written before, so that there is no moment at which it lacks."""
    source, target = storage.local_path(stage.uri), storage.local_path(place)
    storage.remove(place)
    _finish(stage.uri, number)
    with writing(place):
        storage.make_folders(os.path.dirname(target))
        os.rename(source, target)


def _finish(place: str, number: int) -> None:
    storage.write_document(storage.join(place, _WHOLE), {"revision": number})


def _copy(stage: Stage, place: str) -> None:
    storage.remove(place)
    if stage.has_artifact():
        storage.copy_folder(stage.artifact, storage.join(place, storage.name(stage.artifact)))
    for below in (*_files_kept(stage), "state.json"):
        storage.copy_file(storage.join(stage.uri, below), storage.join(place, below))


def _files_kept(stage: Stage) -> Iterator[str]:
    """The files of a stage beside its artifact that are kept when it moves, by path below it; its state is not one."""
    left = {storage.name(stage.artifact), storage.name(stage.annotations), "checkpoints", "state.json", _WHOLE}
    for name in storage.list_directory(stage.uri):
        if name not in left:
            yield from _below(stage.uri, name)


def _below(uri: str, path: str) -> Iterator[str]:
    place = storage.join(uri, path)
    if not storage.is_directory(place):
        yield path
        return
    for name in storage.list_directory(place):
        yield from _below(uri, storage.join(path, name))


def find_finished_elsewhere(run: Run) -> Mapping[str, Stage]:
    """The finished stages of the other runs in the same folder, by the fingerprint of their results.

    A stage that was taken over itself is passed by for the one that made it, if that is still there.
    """
    finished: dict[str, Stage] = {}
    others = [other for other in list_runs(storage.parent(run.uri)) if other.name != run.name]
    for stage in (stage for other in others for stage in other.stages() if stage.is_done()):
        identity = known_identity(stage)
        with suppress(storage.CorruptError):  # one that is damaged is of no use here; its own run tells of it
            if identity is not None:
                result = identity.result_fingerprint(stage.applied_amendments())
                if result not in finished or identity.taken_over_from is None:
                    finished[result] = stage
    return finished


def take_over(stage: Stage, source: Stage, identity: Identity) -> None:
    """Make a stage that has not begun what ``source`` is. ``identity`` is what it is in this run.

    CorruptError, with nothing changed, if the artifact of ``source`` is not what was committed. The state is written
    last: killed before, the stage has not begun.
    """
    storage.verify(source.artifact)
    stage.clear()
    storage.copy_folder(source.artifact, stage.artifact, storage.link_file)
    for below in _files_kept(source):
        bring = storage.copy_file if below.endswith((".jsonl", ".json")) else storage.link_file  # journals are added to
        bring(storage.join(source.uri, below), storage.join(stage.uri, below))
    made_by = known_identity(source)
    origin = (made_by.taken_over_from if made_by else None) or source.run_name
    replace(identity, taken_over_from=origin).write(stage.identity_uri)
    details = source.status().details
    account = {name: part for name, part in details.get("account", {}).items() if name != EVENTS}  # those of its run
    stage.enter("done", **{**details, "account": account, "revision": identity.revision, "taken_over_from": origin})
