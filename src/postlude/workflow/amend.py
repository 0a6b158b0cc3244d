"""``postlude amend``: ask a running stage for a recorded change."""

from __future__ import annotations

from datetime import UTC, datetime

from postlude.manifest.amend import apply_amendment, check_amendment
from postlude.manifest.load import restore
from postlude.manifest.lock import read_lock
from postlude.manifest.problem import ManifestError
from postlude.runs import open_run


def amend(place: str, stage_name: str, assignment: str) -> str:
    """Record KEY=VALUE for a stage of a run, and tell what changes. It holds from the next step on, or from the first
    step after a resume.

    ManifestError if the stage is not there or finished, or the key may not change while it runs.
    """
    run = open_run(place)
    manifest = restore(read_lock(run.read_manifest_lock() or "", run.manifest_lock).manifest)
    if stage_name not in manifest.stages:
        raise ManifestError(f"The run '{place}' has no stage '{stage_name}', but: {', '.join(manifest.stages)}.")
    stage = run.stage(stage_name)
    if stage.status().state == "done":
        raise ManifestError(f"The stage '{stage_name}' of '{place}' is done: an amendment would change nothing.")
    entries = [entry for entry in stage.amendments.read() if "assignment" in entry]
    config = manifest.stages[stage_name]
    for entry in entries:
        config = apply_amendment(config, entry["assignment"])
    change = check_amendment(config, assignment)
    request = {"id": len(entries), "assignment": assignment, "time": datetime.now(UTC).isoformat(timespec="seconds")}
    stage.amendments.append(request, sync=True)
    return f"{stage_name}: {change.key} {change.before} -> {change.value}, from the next step on"
