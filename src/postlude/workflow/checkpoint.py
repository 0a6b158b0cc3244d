"""``postlude checkpoint``: ask a running stage to save its state after the step in progress."""

from __future__ import annotations

import time

from postlude.errors import UserError
from postlude.manifest.load import restore
from postlude.manifest.lock import read_lock
from postlude.manifest.schema import TrainingStage
from postlude.runs import Stage, open_run
from postlude.workflow.amend import asker, check_held_by_newer, now

_POLL_SECONDS = 0.2


def ask_for_checkpoint(place: str, stage_name: str | None = None, by: str | None = None) -> list[tuple[Stage, int]]:
    """Ask the stage, or all that train at the moment, for a checkpoint: each with the number of the request. It changes
    nothing of the result. UserError if none of them runs."""
    run = open_run(place)
    manifest = restore(read_lock(run.read_manifest_lock() or "", run.manifest_lock).manifest)
    if stage_name is not None and stage_name not in manifest.stages:
        raise UserError(f"The run '{place}' has no stage '{stage_name}', but: {', '.join(manifest.stages)}.")
    if (refusal := check_held_by_newer(run)) is not None:
        raise UserError(refusal)
    names = [stage_name] if stage_name is not None else list(manifest.stages)
    trains = [run.stage(name) for name in names if isinstance(manifest.stages[name], TrainingStage)]
    trains = [stage for stage in trains if stage.status().state == "running"]
    if not trains:
        known = ", ".join(f"{name} is {run.stage(name).status().state}" for name in names)
        raise UserError(
            f"'{place}' trains no such stage at the moment, so there is nothing to save: {known}. What other stages "
            "make is kept as it is made."
        )
    asked = []
    for stage in trains:
        number = len(stage.requests().checkpoints)
        stage.amendments.append({"checkpoint": number, "time": now(), "by": by or asker()}, sync=True)
        asked.append((stage, number))
    return asked


def checkpoint(place: str, stage_name: str | None, seconds: float) -> str:
    """The same, and wait until they are there, for so long at most; what came of it, in words. UserError where one did
    not come."""
    told, deadline = [], time.monotonic() + seconds
    for stage, number in ask_for_checkpoint(place, stage_name):
        while (step := stage.requests().checkpoints[number]) is None:
            if (state := stage.status().state) != "running":
                newest = next((f"step {each.step:,}" for each in stage.checkpoints()), "none")
                told.append(f"{stage.name} is {state} meanwhile; its newest checkpoint: {newest}")
                break
            if time.monotonic() > deadline:
                raise UserError(
                    f"The stage '{stage.name}' has not made a checkpoint within {seconds:.0f} seconds. It stands in "
                    "its journal that it was asked for, and comes after the step in progress."
                )
            time.sleep(_POLL_SECONDS)
        else:
            told.append(f"{stage.name} has a checkpoint of step {step:,}")
    return "; ".join(told)
