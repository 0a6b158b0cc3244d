"""``postlude validate`` and ``postlude preview``: what is looked at before anything runs.

A preflight needs no GPU, and is stopped by the first thing that would stop the run. What is looked at follows from the
kind of stage (its ``preflight``). What a stage makes in it of a few records stands in for the data that it will make,
for the stages that read those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from postlude import storage
from postlude.data.preview import Preview
from postlude.errors import UserError
from postlude.manifest.graph import datasets_used
from postlude.manifest.load import Resolved
from postlude.manifest.schema import ModelPlace
from postlude.model.load import weights_are_checked
from postlude.stages.parts import Mode
from postlude.stages.report import StageReport
from postlude.stages.stage import open_stage
from postlude.stages.task import StageTask
from postlude.telemetry.hardware import cores
from postlude.telemetry.tracking import sinks_of
from postlude.training.workers import Workers
from postlude.workflow.begin import verify_paths
from postlude.workflow.compute import check_compute, ranks_of, threads_of
from postlude.workflow.fingerprint import places
from postlude.workflow.manifest import open_manifest
from postlude.workflow.probe import Probed
from postlude.workflow.probe import probe as try_all
from postlude.workflow.run import run_of, workers_for
from postlude.workflow.selection import Selection


@dataclass
class Report:
    """The preflight of a manifest."""

    manifest: str
    stages: list[StageReport] = field(default_factory=list)
    error: UserError | None = None
    access: Probed | None = None

    @property
    def exit_code(self) -> int:
        """0 when everything is good; otherwise that of the error: 2 manifest, 3 data, 4 compute."""
        return self.error.exit_code if self.error else 0

    def to_json(self) -> dict[str, Any]:
        return {
            "manifest": self.manifest,
            "ok": self.error is None,
            "error": self.error.to_json() if self.error else None,
            "stages": [stage.to_json() for stage in self.stages],
            **({"access": self.access.to_json()} if self.access else {}),
        }

    def render(self) -> RenderableType:
        parts: list[RenderableType] = [self.access.render(), Text()] if self.access and self.access.trials else []
        for stage in self.stages:
            parts += [*stage.render(), Text()]
        return Group(*parts, self._verdict())

    def _verdict(self) -> Text:
        if self.error:
            return Text(str(self.error), "red")
        if any(stage.unprinted for stage in self.stages):
            return Text("It can run, but chat templates leave out some of the data: see above.", "yellow")
        return Text("Everything is in order.", "green")


def validate(
    manifest_path: str,
    overrides: Sequence[str],
    sample: int | None = None,
    synthetic: int | None = None,
    probe: bool = False,
) -> Report:
    """The preflight of a manifest. ``sample`` reads only so many records of each data set; ``synthetic`` also
    sends so many made-up records of each format through the pipeline; ``probe`` asks the cluster for nodes and network.
    What is wrong is in the report, not raised.
    """
    report = Report(manifest_path)
    try:
        resolved = open_manifest(manifest_path, overrides)
        check_compute(resolved.manifest)
        sinks_of(resolved.manifest.sinks, run_of(resolved).uri)
        if probe:
            with workers_for(resolved.manifest):
                pass
            report.access = try_all(resolved)
            report.access.require()
        with storage.scratch_folder("validate") as scratch:
            for name in Selection().stages(resolved.manifest):
                report.stages.append(_stage(resolved, name, scratch, sample, synthetic))
    except UserError as error:
        report.error = error
    return report


def _stage(resolved: Resolved, name: str, scratch: str, sample: int | None, synthetic: int | None) -> StageReport:
    config = resolved.manifest.stages[name]
    verify_paths(resolved.manifest, name)
    task = StageTask(resolved.tree, name, storage.join(scratch, resolved.manifest.name), threads=cores())
    stage = open_stage(task, Workers(), Mode(sample=sample, preflight=True))
    report = StageReport(name, ranks_of(resolved.manifest, config), threads_of(resolved.manifest, name))
    report.awaited = stage.parts.makers(datasets_used(config).values())
    stage.preflight(report, synthetic)
    report.remarks += [
        f"{key}: whether the weights of '{place.path}' all have a place in its architecture could not be looked at, "
        "since they are not on this machine. The stage tells when it loads them."
        for key, place in places(config, f"stages.{name}")
        if isinstance(place, ModelPlace) and not weights_are_checked(stage.parts.place_of(place) or "")
    ]
    return report


def preview(
    manifest_path: str,
    overrides: Sequence[str],
    stage: str | None = None,
    blocks: int = 1,
    example: str | None = None,
) -> Preview:
    """What a stage (the first by default) would see first, token by token: the first ``blocks`` packed blocks that it
    trains on, or the first prompts that it puts to a model; or one example, by its id, wherever it comes.

    Data and models that another stage makes are taken from the run, if they are there. Writes nothing into the run.
    """
    resolved = open_manifest(manifest_path, overrides)
    name = Selection(stage).stages(resolved.manifest)[-1 if stage else 0]
    with storage.scratch_folder("validate") as scratch:
        task = StageTask(resolved.tree, name, storage.join(scratch, resolved.manifest.name), threads=1)
        return open_stage(task, Workers(), Mode(artifacts=run_of(resolved))).preview(blocks, example)
