"""What a stage is, whatever it does, the one place that opens one, and its work on one rank.

A kind of stage is a class with these methods, made from the stage's parts. A recipe names it (``does``), so another
kind is one file, with its recipe, and the recipe's entry point: :mod:`postlude.stages.training` is the work of those
that train, :mod:`postlude.stages.work` that of the others.
"""

from __future__ import annotations

from typing import Protocol

from transformers import PreTrainedTokenizerBase

from postlude import storage
from postlude.data.preview import Preview
from postlude.manifest.amend import rules_by_step
from postlude.manifest.component import load_named
from postlude.stages.parts import Mode, Parts, devices_of
from postlude.stages.report import StageReport
from postlude.stages.task import StageTask
from postlude.telemetry import openmp
from postlude.telemetry.alarms import RulesByStep
from postlude.telemetry.progress import Display, StageProgress
from postlude.telemetry.recorder import Recorder
from postlude.training.interruption import Interruption
from postlude.training.program import Summary
from postlude.training.workers import Workers

TO_RUN = Mode()


class Stage(Protocol):
    """One stage on one rank."""

    parts: Parts

    def run(self, recorder: Recorder, stop: Interruption) -> Summary:
        """Work from where the stage stopped to its artifact, or until asked to stop. Every rank calls it."""

    def preview(self, blocks: int, example: str | None = None) -> Preview:
        """So many packed blocks that it would see first, or such as one example is in, given its id. ManifestError
        where there is nothing to be seen."""

    def preflight(self, report: StageReport, synthetic: int | None) -> None:
        """Find out, without a GPU, what would stop the stage, and fill in the report. ``synthetic`` also sends so many
        made-up records of each format through. UserError for what would stop it."""

    @property
    def finished_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that the artifact will have. ManifestError for a stage that makes no model."""


def open_stage(task: StageTask, workers: Workers, mode: Mode = TO_RUN) -> Stage:
    """A stage on one rank, as its recipe needs it. ManifestError if it cannot be imported."""
    parts = Parts(task, workers, mode, _finished_tokenizer)
    return load_named(parts.config.does)(parts)


def _finished_tokenizer(task: StageTask, workers: Workers, mode: Mode) -> PreTrainedTokenizerBase:
    return open_stage(task, workers, mode).finished_tokenizer


def run_stage_here(task: StageTask, stop: Interruption) -> Summary:
    """Work on a stage in this process, which has a terminal: alone, or as the rank that the environment names
    (torchrun's variables)."""
    openmp.compute_with(task.threads)
    with StageProgress(task.stage) as display:
        return run_stage(task, stop, display)


def run_stage(task: StageTask, stop: Interruption, display: Display) -> Summary:
    """Work on a stage as one of its ranks, until its artifact is written or until asked to stop."""
    workers = Workers.join(*devices_of(task))
    try:
        with storage.guarded(task.run, task.guard):
            stage = open_stage(task, workers)
            parts = stage.parts
            shown = display if workers.leads else None  # the others would show the same

            def rules() -> RulesByStep:
                return rules_by_step(parts.manifest, task.stage, parts.stage.applied_amendments())

            with Recorder(parts.run, task.stage, workers.rank, shown, rules) as recorder:
                return stage.run(recorder, stop)
    finally:
        workers.leave()
