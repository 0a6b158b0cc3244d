"""What a stage is, whatever it does, and the one place that opens one.

A kind of stage is a class with these methods, made from the stage's parts. A recipe names it (``does``), so another
kind is one file, with its recipe, and the recipe's entry point.
"""

from __future__ import annotations

from typing import Protocol

from transformers import PreTrainedTokenizerBase

from postlude.data.preview import Preview
from postlude.manifest.component import load_named
from postlude.stages.parts import Mode, Parts, StageTask
from postlude.stages.report import StageReport
from postlude.telemetry.recorder import Recorder
from postlude.training.interruption import Interruption
from postlude.training.summary import Summary
from postlude.training.workers import Workers

TO_RUN = Mode()


class Stage(Protocol):
    """One stage on one rank."""

    parts: Parts

    def run(self, recorder: Recorder, stop: Interruption) -> Summary:
        """Work from where the stage stopped to its artifact, or until asked to stop. Every rank calls it."""
        ...

    def preview(self, blocks: int) -> Preview:
        """So many packed blocks that it would see first. ManifestError where there is nothing to be seen."""
        ...

    def preflight(self, report: StageReport, synthetic: int | None) -> None:
        """Find out, without a GPU, what would stop the stage, and fill in the report. ``synthetic`` also sends so many
        made-up records of each format through. UserError for what would stop it."""
        ...

    @property
    def finished_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that the artifact will have. ManifestError for a stage that makes no model."""
        ...


def open_stage(task: StageTask, workers: Workers, mode: Mode = TO_RUN) -> Stage:
    """A stage on one rank, as its recipe needs it. ManifestError if it cannot be imported."""
    parts = Parts(task, workers, mode, _finished_tokenizer)
    return load_named(parts.config.does)(parts)


def _finished_tokenizer(task: StageTask, workers: Workers, mode: Mode) -> PreTrainedTokenizerBase:
    return open_stage(task, workers, mode).finished_tokenizer
