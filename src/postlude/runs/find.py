"""From what a user types to a run, a stage or an artifact: ``RUN``, ``RUN/STAGE``."""

from __future__ import annotations

from collections.abc import Sequence

from postlude import storage
from postlude.errors import UserError
from postlude.nearest import suggestion
from postlude.runs.run import Run
from postlude.runs.stage import Stage


def open_run(uri: str) -> Run:
    """The run at ``uri``. UserError, with the nearest run beside it, if there is none."""
    run = Run(uri.rstrip("/") or uri)
    if run.exists():
        return run
    beside = [other.name for other in list_runs(storage.parent(run.uri))]
    raise UserError(f"'{uri}' is not a run directory: it has no manifest.lock.yaml.{_nearest(run.name, beside, 'run')}")


def list_runs(uri: str) -> list[Run]:
    """The runs directly in a folder, by name; the folder itself if it is a run."""
    if Run(uri).exists():
        return [Run(uri)]
    return [run for run in (Run(storage.join(uri, name)) for name in storage.list_directory(uri)) if run.exists()]


def find(place: str) -> Stage:
    """The stage that ``RUN/STAGE`` names; for ``RUN`` its last stage that is done, or else that has begun.

    UserError, with the nearest names, if there is no such run or stage.
    """
    run, name = _split(place)
    run = run or open_run(place)
    stages = run.stages()
    if name is not None:
        match = next((stage for stage in stages if stage.name == name), None)
        if match is None:
            hint = _nearest(name, [stage.name for stage in stages], "stage")
            raise UserError(f"The run '{run.uri}' has no stage '{name}' that has begun.{hint}")
        return match
    if not stages:
        raise UserError(f"No stage of the run '{run.uri}' has begun.")
    return ([stage for stage in stages if stage.status().state == "done"] or stages)[-1]


def artifact_of(place: str) -> str | None:
    """The URI of the artifact that ``RUN`` or ``RUN/STAGE`` names; None if ``place`` is in no run at all.

    UserError if the stage has no artifact yet.
    """
    if _split(place)[0] is None:
        return None
    stage = find(place)
    if not stage.has_artifact():
        raise UserError(
            f"The stage '{stage.name}' of '{place}' has no model yet: it is {stage.status().state}. "
            "Wait until it is done, or run it again."
        )
    return stage.artifact


def _split(place: str) -> tuple[Run | None, str | None]:
    """The run that ``place`` is or lies in, and the name of the stage; both None if it lies in no run."""
    place = place.rstrip("/") or place
    above, last = storage.parent(place), storage.name(place)
    candidates: list[tuple[str, str | None]] = [(place, None), (above, last)]
    if storage.name(above) == "stages":
        candidates.append((storage.parent(above), last))
    for uri, name in candidates:
        if Run(uri).exists():
            return Run(uri), name
    return None, None


def _nearest(name: str, known: Sequence[str], what: str) -> str:
    listed = f" There is the {what} {', '.join(map(repr, known))}." if known else ""
    return suggestion(name, known) or listed
