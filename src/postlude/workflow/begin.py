"""From a decision to a stage that can run: its inputs verified, what stood there moved aside, what it is begun with
written down.

Each function may be killed at any moment: what it leaves, the next plan reads as the same decision or as one that leads
to the same end.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from postlude import storage
from postlude.errors import UserError
from postlude.manifest.graph import needs
from postlude.manifest.load import Resolved
from postlude.runs import Identity, Run, set_aside, take_over
from postlude.telemetry import events
from postlude.telemetry.progress import say
from postlude.workflow.fingerprint import Identifier
from postlude.workflow.plan import Decision


class DamagedInput(UserError):
    """An artifact that a stage needs is not what was committed."""


def verify_inputs(run: Run, stage: str, needed: Iterable[str]) -> None:
    """Read every file of the artifacts that a stage needs. :class:`DamagedInput` if one is not what was written."""
    for need in needed:
        try:
            storage.verify(run.stage(need).artifact)
        except (storage.CorruptError, storage.NotFound) as error:
            raise DamagedInput(
                f"The stage '{stage}' needs what the stage '{need}' made, but that is not what was committed. "
                f"{error} Put the file back as it was, or make it anew with --from {need}."
            ) from error


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
        before = stage.identity()
        if before is None or before.fingerprint != identity.fingerprint:
            stage.clear()
    if decision.action != "resume":
        replace(identity, taken_over_from=None).write(stage.identity_uri)
