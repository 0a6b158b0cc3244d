"""A stage on one rank, from its last sound checkpoint to its artifact."""

from __future__ import annotations

from typing import Any

from postlude import __version__, storage
from postlude.manifest.lock import manifest_hash, versions
from postlude.model.export import write_model
from postlude.recipes.assembly import Assembly, StageTask
from postlude.runs import provenance
from postlude.telemetry.progress import StageProgress
from postlude.telemetry.recorder import Recorder
from postlude.training.interruption import Interruption
from postlude.training.trainer import Summary
from postlude.training.workers import Workers


def run_stage(task: StageTask) -> Summary:
    """Train a stage to its end and write its artifact, or until the process is asked to stop."""
    gpus = Assembly(task, Workers()).gpus_per_worker
    workers = Workers.join(gpus)
    try:
        with Interruption().listening() as stop:
            assembly = Assembly(task, workers)
            with StageProgress(task.stage) as display, recorder_of(assembly, display) as recorder:
                return _train(assembly, recorder, stop)
    finally:
        workers.leave()


def recorder_of(assembly: Assembly, display: StageProgress | None) -> Recorder:
    """Where the rank's numbers go; only the leading rank shows them."""
    leads = assembly.workers.leads
    return Recorder(
        assembly.run,
        assembly.task.stage,
        assembly.manifest.sinks,  # type: ignore[arg-type]
        assembly.workers.rank,
        display if leads else None,
    )


def _train(assembly: Assembly, recorder: Recorder, stop: Interruption) -> Summary:
    workers = assembly.workers
    checkpoint = workers.from_lead(_newest_sound(assembly, recorder) if workers.leads else None)
    if workers.leads:
        assembly.stage.cut_back(checkpoint[0] if checkpoint else 0)
    workers.barrier()
    trainer = assembly.trainer(recorder, stop)
    if checkpoint is not None:
        trainer.restore(checkpoint[1])
    recorder.event("stage_started", from_step=trainer.step)
    summary = trainer.fit()
    if not summary.interrupted and workers.leads:
        _write_artifact(assembly, summary)
        recorder.event("stage_finished", steps=summary.steps)
    workers.barrier()
    return summary


def _newest_sound(assembly: Assembly, recorder: Recorder) -> tuple[int, str] | None:
    """The newest checkpoint whose files are what was written, as step and URI; damaged ones are told and passed."""
    for checkpoint in assembly.stage.checkpoints():
        try:
            storage.verify(checkpoint.uri)
        except storage.CorruptError as error:
            recorder.event("checkpoint_skipped", step=checkpoint.step, reason=str(error))
            continue
        return checkpoint.step, checkpoint.uri
    return None


def _write_artifact(assembly: Assembly, summary: Summary) -> None:
    with assembly.stage.write_artifact() as folder:
        write_model(
            assembly.program.roles["policy"].model,
            assembly.finished_tokenizer,
            folder,
            lineage(assembly, summary),
            stop_ids=assembly.stop_ids,
        )


def lineage(assembly: Assembly, summary: Summary) -> dict[str, Any]:
    """What the artifact came from: manifest, data, the model before it, and everything that computed."""
    return {
        "run": assembly.run.name,
        "stage": assembly.task.stage,
        "recipe": assembly.config.recipe,
        "steps": summary.steps,
        "manifest_sha256": manifest_hash(assembly.task.tree),
        **provenance(assembly.run, assembly.task.stage),
        "model": assembly.config.model.model_dump(mode="json", by_alias=True, exclude_none=True),
        "data": {name: dataset.fingerprint for name, dataset in assembly.datasets.items()},
        "amendments": [entry["assignment"] for entry in assembly.stage.amendments.read() if "assignment" in entry],
        "precision": {"name": assembly.precision.name, "reason": assembly.precision.reason},
        "versions": {**versions(), "postlude": __version__},
    }
