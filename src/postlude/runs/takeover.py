"""Taking over: what another run made with the same fingerprint is brought into this one, not made again.

Local files are linked, remote ones copied. The lineage in the artifact stays that of the run that made it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from postlude import storage
from postlude.runs.find import list_runs
from postlude.runs.identity import Identity
from postlude.runs.revisions import files_kept
from postlude.runs.run import Run
from postlude.runs.stage import Stage


def find_finished_elsewhere(run: Run) -> Mapping[str, Stage]:
    """The finished stages of the other runs in the same folder, by the fingerprint of their results.

    A stage that was taken over itself is passed by for the one that made it, if that is still there.
    """
    finished: dict[str, Stage] = {}
    others = [other for other in list_runs(storage.parent(run.uri)) if other.name != run.name]
    for stage in (stage for other in others for stage in other.stages() if stage.is_done()):
        identity = stage.identity()
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
    for below in files_kept(source):
        bring = storage.copy_file if below.endswith((".jsonl", ".json")) else storage.link_file  # journals are added to
        bring(storage.join(source.uri, below), storage.join(stage.uri, below))
    made_by = source.identity()
    origin = (made_by.taken_over_from if made_by else None) or source.run_name
    replace(identity, taken_over_from=origin).write(stage.identity_uri)
    details = source.status().details
    stage.enter("done", **{**details, "revision": identity.revision, "taken_over_from": origin})
