"""A stage on one rank, from where it stopped to its artifact."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from postlude import __version__, storage
from postlude.manifest.lock import manifest_hash, versions
from postlude.model.export import send_model, write_model
from postlude.recipes.online import OnlineRecipe
from postlude.runs import provenance
from postlude.stages.annotate import annotate, forget_annotations
from postlude.stages.online import OnlineAssembly
from postlude.stages.parts import Parts, StageTask
from postlude.stages.portions import Portions
from postlude.stages.preflight import check_memory
from postlude.stages.training import Assembly
from postlude.stages.work import Entry, Work, WorkRecipe
from postlude.stages.workbench import Workbench
from postlude.telemetry.progress import Display, StageProgress, console
from postlude.telemetry.recorder import Recorder
from postlude.training.interruption import Interruption
from postlude.training.summary import Summary
from postlude.training.workers import Workers


def run_stage(task: StageTask, stop: Interruption, display: Display) -> Summary:
    """Work on a stage as one of its ranks, until its artifact is written or until asked to stop."""
    parts = Parts(task, Workers())
    workers = Workers.join(parts.gpus_per_worker, parts.mesh_shape)
    try:
        parts = assembled(task, workers)
        with recorder_of(parts, display) as recorder:
            if isinstance(parts, Assembly):
                return _train(parts, recorder, stop)
            return _work(parts, recorder, stop)
    finally:
        workers.leave()


def assembled(task: StageTask, workers: Workers) -> Assembly | Workbench:
    """The parts of a stage, as its recipe needs them."""
    config = Parts(task, workers).stage_config
    if isinstance(config, WorkRecipe):
        return Workbench(task, workers)
    return (OnlineAssembly if isinstance(config, OnlineRecipe) else Assembly)(task, workers)


def run_stage_here(task: StageTask) -> Summary:
    """Work on a stage in this process, which has a terminal and listens to signals: alone, or as the rank that the
    environment names (torchrun's variables)."""
    torch.set_num_threads(task.threads)
    with Interruption().listening() as stop, StageProgress(task.stage) as display:
        return run_stage(task, stop, display)


def recorder_of(parts: Parts, display: Display | None) -> Recorder:
    """Where the rank's numbers go; only the leading rank shows them."""
    leads = parts.workers.leads
    return Recorder(
        parts.run,
        parts.task.stage,
        parts.manifest.sinks,  # type: ignore[arg-type]
        parts.workers.rank,
        display if leads else None,
    )


# --- stages that do something else than train ---------------------------------------------------------------


def _work(bench: Workbench, recorder: Recorder, stop: Interruption) -> Summary:
    work = bench.config.begin(bench)
    portions = Portions(bench, work)
    if not bench.workers.from_lead(bench.stage.has_artifact()):
        if portions.do_all(recorder, stop) is None:
            return Summary(0, interrupted=True)
        if bench.workers.leads:
            report = finish(bench, work, portions.read())
            for kind, fields in work.events(report):
                recorder.event(kind, **fields)
            console().print(work.table(report))
            recorder.event("stage_finished", steps=work.portions)
    if bench.workers.leads:
        portions.remove()
    bench.workers.barrier()
    return Summary(work.portions)


def finish(bench: Workbench, work: Work, portions: Iterable[Sequence[Entry]]) -> dict[str, Any]:
    """Write the artifact of a stage that does not train, and return the report on it."""
    with bench.stage.write_artifact() as folder:
        report = dict(work.finish(portions, folder))
        written = {"report.json": report, "lineage.json": work_lineage(bench, work)}
        for name, content in written.items():
            storage.write_text(storage.join(folder, name), json.dumps(content, indent=2) + "\n")
    return report


def work_lineage(bench: Workbench, work: Work) -> dict[str, Any]:
    """What the artifact of a stage that does not train came from."""
    return {
        "run": bench.run.name,
        "stage": bench.task.stage,
        "recipe": bench.config.recipe,
        "steps": work.portions,
        "manifest_sha256": manifest_hash(bench.task.tree),
        **provenance(bench.run, bench.task.stage),
        "models": dict(work.parents()),
        "data": dict(work.reads),
        "versions": {**versions(), "postlude": __version__},
    }


# --- stages that train --------------------------------------------------------------------------------------


def _train(assembly: Assembly, recorder: Recorder, stop: Interruption) -> Summary:
    workers = assembly.workers
    checkpoint = workers.from_lead(_newest_sound(assembly, recorder) if workers.leads else None)
    if workers.leads:
        assembly.stage.cut_back(checkpoint[0] if checkpoint else 0)
    workers.barrier()
    if not annotate(assembly, recorder, stop):
        return Summary(0, interrupted=True)
    check_memory(assembly)
    trainer = assembly.trainer(recorder, stop)
    if checkpoint is not None:
        trainer.restore(checkpoint[1])
    recorder.event("stage_started", from_step=trainer.step)
    summary = trainer.fit()
    if not summary.interrupted:
        _write_artifact(assembly, summary)
        if workers.leads:
            recorder.event("stage_finished", steps=summary.steps)
            forget_annotations(assembly)
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
    """By the leading rank; the others send it their parts of a model that they hold together."""
    model = assembly.program.roles["policy"].model
    if not assembly.workers.leads:
        send_model(model)
        return
    with assembly.stage.write_artifact() as folder:
        write_model(
            model,
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
