"""``postlude run``: the stages of a manifest in the order of their dependencies, each resumed where it stopped."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import Any

from postlude import storage
from postlude.cluster.local import run_ranks
from postlude.manifest.errors import ManifestError, UserError
from postlude.manifest.graph import needs, order
from postlude.manifest.load import Resolved, load
from postlude.manifest.lock import differences, lock_text, read_lock
from postlude.recipes.assembly import StageTask
from postlude.runs import Run
from postlude.telemetry import events
from postlude.telemetry.progress import stage_table
from postlude.workflow.compute import check_compute, ranks_of, threads_of

INTERRUPTED = 130


def run(manifest_path: str, overrides: Sequence[str], stage: str | None = None, inline: bool = False) -> int:
    """Run a manifest, or one stage of it and what that hangs on, and return the exit code of the command.

    A finished stage is kept, an unfinished one continues from its last committed checkpoint. ``inline`` runs every
    stage in this process, for a debugger. :class:`UserError` on what the user can mend; the run can be continued.
    """
    resolved = load(storage.read_bytes(manifest_path), manifest_path, overrides)
    check_compute(resolved.manifest)
    run = Run(storage.join(resolved.manifest.run_dir, resolved.manifest.name))
    with run.hold():
        lock(run, resolved)
        tell(run, "run_started", host=socket.gethostname(), pid=os.getpid())
        names = stages_in_order(resolved, stage)
        for name in names:
            if run.stage(name).status().state != "done" and run_stage(run, resolved, name, inline) == INTERRUPTED:
                tell(run, "run_interrupted", reason=f"asked to stop in stage {name}")
                return INTERRUPTED
        tell(run, "run_finished")
        stage_table(run, names)
    return 0


def tell(run: Run, kind: str, **fields: Any) -> None:
    """Record an event of the run as a whole."""
    events.record(run.events, events.make(kind, **fields))


def stages_in_order(resolved: Resolved, wanted: str | None = None) -> list[str]:
    """The stages, each after those it starts from; only ``wanted`` and what it hangs on where it is given."""
    stages = resolved.manifest.stages
    if wanted is not None and wanted not in stages:
        raise ManifestError(f"There is no stage '{wanted}'. The manifest has: {', '.join(stages)}.")
    ordered = order(resolved.manifest)
    if wanted is None:
        return ordered
    needed = {wanted}
    for name in reversed(ordered):
        if name in needed:
            needed |= set(needs(resolved.manifest, name))
    return [name for name in ordered if name in needed]


def lock(run: Run, resolved: Resolved) -> None:
    """Write the manifest lock, or hold the manifest against the one that is there.

    :class:`ManifestError` with the differences if a stage that has begun was changed.
    """
    before = run.read_manifest_lock()
    if before is not None:
        locked = read_lock(before)
        changes: dict[str, None] = {}
        for stage in run.stages():
            if stage.name in resolved.manifest.stages and stage.name in locked.stages:
                changed = differences(locked, resolved, stage.name, resolved.manifest.stages[stage.name].free)
                if stage.has_begun():
                    changes |= dict.fromkeys(changed)
                elif changed:
                    stage.clear()
        if changes:
            raise ManifestError(
                f"The run '{run.uri}' has begun with another manifest, and a stage that has begun does not change:\n  "
                + "\n  ".join(changes)
                + "\nUndo the change, give the run another name, or change what may change while a stage runs with "
                "`postlude amend`."
            )
    threads = {
        name: threads_of(stage, ranks_of(resolved.manifest, stage)) for name, stage in resolved.manifest.stages.items()
    }
    run.write_manifest_lock(lock_text(resolved, threads))


def run_stage(run: Run, resolved: Resolved, name: str, inline: bool) -> int:
    """Run one stage to its end, or until it is interrupted; returns 0 or 130."""
    config = resolved.manifest.stages[name]
    ranks = 1 if inline else ranks_of(resolved.manifest, config)
    threads = threads_of(config, ranks)
    task = StageTask(tree=resolved.tree, stage=name, run=run.uri, threads=threads)
    stage = run.stage(name)
    stage.enter("running", process=os.getpid())
    try:
        summary = run_ranks("postlude.recipes.execution:run_stage", task, ranks, threads)[0]
    except KeyboardInterrupt:
        stage.enter("interrupted")
        raise
    except Exception as error:
        said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        stage.enter("failed", error=said)
        events.record(run.events, events.make("failure", name, error=said))
        raise
    stage.enter("interrupted" if summary.interrupted else "done", steps=summary.steps)
    return INTERRUPTED if summary.interrupted else 0
