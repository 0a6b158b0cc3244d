"""From a decision to a stage that can run: its inputs verified, what stood there moved aside, what it is begun with
written down.

Each function may be killed at any moment: what it leaves, the next plan reads as the same decision or as one that leads
to the same end.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from postlude import storage
from postlude.data.sources.source import Source
from postlude.errors import UserError
from postlude.manifest.graph import datasets_used, needs
from postlude.manifest.load import Resolved
from postlude.manifest.schema import Manifest
from postlude.runs import (
    Identity,
    Run,
    artifact_of,
    known_identity,
    missing,
    set_aside,
    settle_events,
    take_over,
)
from postlude.telemetry import events
from postlude.telemetry.progress import say
from postlude.workflow.fingerprint import Identifier, places
from postlude.workflow.plan import Decision

ADAPTER_CONFIG = "adapter_config.json"
"""Only an adapter has this file."""


class DamagedInput(UserError):
    """An artifact that a stage needs is not what was committed."""


def verify_inputs(run: Run, stage: str, needed: Iterable[str]) -> None:
    """Read every file of the artifacts that a stage needs. :class:`DamagedInput` if one is not what was written."""
    for need in needed:
        try:
            storage.read_marker(run.stage(need).artifact)
            _verify(run.stage(need).artifact)
        except (storage.CorruptError, storage.NotFound) as error:
            raise DamagedInput(
                f"The stage '{stage}' needs what the stage '{need}' made, but that is not what was committed. "
                f"{error} Put the file back as it was, or make it anew with --from {need}."
            ) from error


def verify_paths(manifest: Manifest, stage: str) -> None:
    """Read every file of the artifacts that a stage names by their paths, as its models or its data.
    :class:`DamagedInput` as above."""
    config = manifest.stages[stage]
    for key, place in places(config, f"stages.{stage}"):
        verify_model(place.path or "", key)
    for name in sorted(set(datasets_used(config).values())):
        source = manifest.data[name].source
        files = source.files() if isinstance(source, Source) else []
        for folder in sorted({storage.parent(file) for file in files}):
            if storage.is_committed(folder):
                _verify_named(folder, folder, f"data.{name}")


def verify_model(path: str, key: str | None = None) -> None:
    """Read every file of a model, named by ``key``, that is the artifact of a stage; of any other there is nothing to
    compare. :class:`DamagedInput` as above."""
    try:
        place = artifact_of(path) or path
    except UserError:
        return  # that there is no model yet is told by who loads it
    _verify_named(place, path, key)


def _verify_named(place: str, path: str, key: str | None) -> None:
    try:
        _verify(place)
    except storage.CorruptError as error:
        named = f", which {key} names," if key else ""
        raise DamagedInput(
            f"The artifact at '{path}'{named} is not what was committed. {error} Put the file back as it was, or, if "
            f"it was changed on purpose, remove '{storage.join(place, storage.MARKER)}'."
        ) from error


def _verify(place: str) -> None:
    """Read every file of a model that was committed, and of those that it is an adapter on."""
    seen: set[str] = set()
    while place not in seen:
        seen.add(place)
        if storage.is_committed(place):
            storage.verify(place)
        place = base_of(place) or place


def base_of(place: str) -> str | None:
    """The model that an adapter at ``place`` belongs to; None where it is no adapter, or whoever loads it will tell."""
    try:
        named = json.loads(storage.read_bytes(storage.join(place, ADAPTER_CONFIG)))["base_model_name_or_path"]
        if not (storage.is_local(named) and storage.is_local(place)):
            return str(named)
    except (storage.StorageError, ValueError, KeyError, TypeError, AttributeError):
        return None
    folder = Path(storage.local_path(place)).absolute()
    roots = (Path.cwd(), folder, *folder.parents)  # where the loader looks, in that order
    bases = (str(root / named) for root in roots)
    return next(filter(storage.is_committed, bases), str(named))


def verify_kept(run: Run, stages: Iterable[str]) -> None:
    """Read every file of finished stages again; behind a remote URI, where that is dear and the store sees to it, only
    what is short. :class:`DamagedInput` if an artifact is not what was committed; what else is not, is told."""
    is_local = storage.is_local(run.uri)
    for name in stages:
        stage = run.stage(name)
        try:
            (storage.verify if is_local else storage.read_marker)(stage.artifact)
        except (storage.CorruptError, storage.NotFound) as error:
            raise DamagedInput(
                f"What the finished stage '{name}' made is not what was committed. {error} Put the file back as it "
                f"was, or make it anew with --from {name}."
            ) from error
        for damage in missing(stage, deep=is_local):
            _tell(run, name, "not what was written", damage)


def mend_records(run: Run) -> None:
    """Before anything is planned: set aside what is damaged of what the run says of itself, write again what follows
    from the rest, and tell it. NewerSchema where a newer version has written."""
    stages = run.stages()
    for journal in (run.events, *(journal for stage in stages for journal in stage.journals)):
        with suppress(storage.CorruptError):
            journal.last()  # a newer version's: told before anything is changed
    for wrong in (settle_events(run.events, stages), events.drop_damaged(run.events)):
        if wrong is not None:
            _tell(run, None, "events", wrong)
    for stage in stages:
        for what, damage in {"state": stage.set_state_aside(), "readings": stage.readings.drop_damaged()}.items():
            if damage is not None:
                _tell(run, stage.name, f"{what} set aside", damage)


def mend_identity(run: Run, decision: Decision) -> None:
    """Write again what a stage that is kept or goes on was begun with, where that was lost."""
    stage = run.stage(decision.stage)
    if known_identity(stage) is None:
        if storage.exists(stage.identity_uri):
            storage.set_aside(stage.identity_uri)
        origin = stage.status().details.get("taken_over_from")
        replace(decision.identity, taken_over_from=origin).write(stage.identity_uri)
        _tell(run, decision.stage, "identity written again", "It was lost, and is that of the manifest.")


def _tell(run: Run, stage: str | None, what: str, reason: str) -> None:
    say(f"{stage or run.name}: {what}: {reason}")
    events.record(run.events, "alarm", stage, what=what, reason=reason)


def identity_now(resolved: Resolved, run: Run, decision: Decision) -> Identity:
    """What the stage is begun with at this moment: its inputs have run since the plan was made, and may have been
    amended."""
    inputs, revisions = {}, {}
    for need in needs(resolved.manifest, decision.stage):
        identity = run.stage(need).identity()
        inputs[need] = run.stage(need).result_fingerprint() or ""
        revisions[need] = identity.revision if identity else 1
    now = Identifier(resolved, run)(decision.stage, inputs, revisions)
    return replace(now, revision=decision.identity.revision)


def make_room(run: Run, decision: Decision) -> None:
    """Move aside what stands in a stage that begins anew."""
    if decision.replaces:
        number = set_aside(run, decision.stage)
        events.record(run.events, "stage_set_aside", decision.stage, revision=number, reasons=decision.reasons)


def try_take_over(run: Run, decision: Decision, identity: Identity) -> bool:
    """Bring what another run made into the stage. False, and told, if that is damaged or is gone: then it must run."""
    source = decision.source
    if source is None or identity.fingerprint != decision.identity.fingerprint:
        return False
    try:
        take_over(run.stage(decision.stage), source, identity)
    except (storage.CorruptError, storage.NotFound) as error:
        say(f"{decision.stage}: not taken over from {source.run_name}: {error}")
        return False
    events.record(run.events, "stage_taken_over", decision.stage, run=source.run_name, revision=identity.revision)
    return True


def begin(run: Run, decision: Decision, identity: Identity) -> None:
    """Write down what the stage is begun with. What a kill or a failure before its first step left behind goes, unless
    it was begun with the same."""
    stage = run.stage(decision.stage)
    if not stage.has_begun():
        before = known_identity(stage)
        if before is None or before.fingerprint != identity.fingerprint:
            stage.clear()
    if decision.action != "resume":
        replace(identity, taken_over_from=None).write(stage.identity_uri)
