"""Revisions: what a stage made before it was begun anew stands under ``RUN/revisions/STAGE/0001/``.

Kept are the artifact with its lineage, metrics, losses by example and what the stage was begun with; checkpoints and
stored streams go.
Every function here may be killed at any moment and called again: until a revision stands whole, the stage is where it
was, and after that it is gone from there or counts as not begun.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from postlude import storage
from postlude.runs.run import Run
from postlude.runs.stage import Stage
from postlude.storage import exact_json
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
    identity = stage.identity() if stage.has_begun() else None
    if identity is not None:
        return identity.revision
    return 1 + max((int(storage.name(earlier.uri)) for earlier in revisions(run, name)), default=0)


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
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.rename(source, target)


def _finish(place: str, number: int) -> None:
    storage.write_text(storage.join(place, _WHOLE), exact_json.dump({"revision": number}) + "\n")


def _copy(stage: Stage, place: str) -> None:
    storage.remove(place)
    if stage.has_artifact():
        storage.copy_folder(stage.artifact, storage.join(place, storage.name(stage.artifact)))
    for below in (*files_kept(stage), "state.json"):
        storage.copy_file(storage.join(stage.uri, below), storage.join(place, below))


def files_kept(stage: Stage) -> Iterator[str]:
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
