"""``postlude validate``: a preflight without a GPU, stopped by the first thing that would stop the run.

For each stage that trains: its data are read, rendered, masked and packed; its memory is planned; and one real
optimiser step is made on this machine's CPU, with a model of the same architecture made small where it is large.
For each that does something else: its data are read and counted, and a few records go all the way, through such models.
What they give stands in for the data that the stage will make, for the stages that read those.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from postlude import storage
from postlude.data.measure import measure
from postlude.data.statistics import Statistics
from postlude.data.synthetic import Verdict, try_synthetic
from postlude.errors import DataError, UserError
from postlude.manifest.graph import datasets_used
from postlude.manifest.load import Resolved, load
from postlude.recipes.online import OnlineRecipe
from postlude.stages.online import OnlineAssembly
from postlude.stages.parts import Parts, StageTask
from postlude.stages.preflight import Rehearsal, rehearse
from postlude.stages.training import Assembly
from postlude.stages.trial import Trial, try_out
from postlude.stages.work import WorkRecipe
from postlude.telemetry.hardware import cores
from postlude.training.workers import Workers
from postlude.workflow.compute import check_compute, ranks_of, threads_of
from postlude.workflow.run import workers_for
from postlude.workflow.selection import stages_in_order


@dataclass
class StageReport:
    """What the preflight found out about one stage."""

    stage: str
    workers: int
    threads: int
    statistics: Statistics | None = None
    """Of the data that a stage trains on; None for another, and where none are there yet."""
    rehearsal: Rehearsal | None = None
    trial: Trial | None = None
    """Of a stage that does something else than train, or that answers prompts."""
    awaited: dict[str, str] = field(default_factory=dict)
    """Data sets that are not there yet, with the stage that makes each."""
    held_out: dict[str, int] = field(default_factory=dict)
    """How many documents each evaluation runs over."""
    remarks: list[str] = field(default_factory=list)
    """What is not wrong, but should be known before training."""
    synthetic: dict[str, list[Verdict]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "workers": self.workers,
            "threads": self.threads,
            "data": self.statistics.to_json() if self.statistics else None,
            "held_out_documents": self.held_out,
            "step": self.rehearsal.to_json() if self.rehearsal else None,
            "trial": self.trial.to_json() if self.trial else None,
            "awaited": self.awaited,
            "remarks": self.remarks,
            "synthetic": {name: [v.to_json() for v in verdicts] for name, verdicts in self.synthetic.items()},
        }


@dataclass
class Report:
    """The preflight of a manifest."""

    manifest: str
    stages: list[StageReport] = field(default_factory=list)
    error: UserError | None = None

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
        }

    def render(self) -> RenderableType:
        parts: list[RenderableType] = []
        for stage in self.stages:
            parts += [f"[bold]{stage.stage}[/bold]: {stage.workers} worker(s) of {stage.threads} thread(s)"]
            parts += stage.statistics.tables() if stage.statistics else []
            parts += [Text(f"Held out: {name}, documents {n:,}") for name, n in stage.held_out.items()]
            parts += [_synthetic_table(name, verdicts) for name, verdicts in stage.synthetic.items()]
            parts += [found.render() for found in (stage.trial, stage.rehearsal) if found]
            parts += [Text(f"Not there yet: {name}, which '{maker}' makes.") for name, maker in stage.awaited.items()]
            parts += [Text(f"Note: {remark}", "yellow") for remark in stage.remarks]
        parts += [Text(str(self.error), "red") if self.error else Text("Everything is in order.", "green")]
        return Group(*parts)


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
        resolved = load(storage.read_bytes(manifest_path), manifest_path, overrides)
        check_compute(resolved.manifest)
        if probe:
            with workers_for(resolved.manifest):
                pass
        with tempfile.TemporaryDirectory(prefix="postlude-") as scratch:
            for name in stages_in_order(resolved):
                report.stages.append(_stage(resolved, name, scratch, sample, synthetic))
    except UserError as error:
        report.error = error
    return report


def _stage(resolved: Resolved, name: str, scratch: str, sample: int | None, synthetic: int | None) -> StageReport:
    config = resolved.manifest.stages[name]
    workers = ranks_of(resolved.manifest, config)
    task = StageTask(resolved.tree, name, storage.join(scratch, resolved.manifest.name), threads=cores())
    report = StageReport(name, workers, threads_of(resolved.manifest, name))
    report.awaited = Parts(task, Workers()).makers(datasets_used(config).values())
    if isinstance(config, WorkRecipe):
        report.trial = try_out(task, sample)
        return report
    if isinstance(config, OnlineRecipe):
        online = OnlineAssembly(task, Workers(), sample=sample)
        online.is_preflight = True
        report.trial = Trial(online.counts(), None, "the small step below answers two of the prompts")
        report.rehearsal = rehearse(online)
        return report
    assembly = Assembly(task, Workers(), sample=sample)
    assembly.is_preflight = True
    if synthetic:
        for data, source in assembly.sources.items():
            format: Any = resolved.manifest.data[data].format
            report.synthetic[data] = try_synthetic(format, source.encoder.encode, synthetic, resolved.manifest.seed)
    try:
        report.statistics = measure(
            assembly.sources,
            assembly.config.data,
            seed=resolved.manifest.seed,
            block=assembly.config.batch.block,
            window=assembly.config.batch.window,
            rows={name: dataset.rows for name, dataset in assembly.datasets.items()},
        )
    except DataError as error:
        if not set(assembly.config.data) <= set(report.awaited):
            raise
        # A few records of small random models may be such that nothing in them can be trained on.
        report.remarks.append(f"not tried further, since the records of a trial are of no use: {error}")
        return report
    report.held_out = {
        name: sum(len(unit.documents) for block in blocks for unit in block)
        for name, blocks in assembly.evaluations.items()
    }
    report.rehearsal = rehearse(assembly)
    report.remarks += [remark for source in assembly.conversations.values() for remark in source.encoder.remarks]
    if report.awaited:
        report.remarks.append("what is counted of data that are not there yet is a trial of a few records")
    return report


def _synthetic_table(name: str, verdicts: Sequence[Verdict]) -> Table:
    table = Table(title=f"{name}: synthetic records", title_justify="left")
    for column in ("record", "count", "expected", "came out"):
        table.add_column(column, justify="right" if column == "count" else "left")
    for verdict in verdicts:
        style = None if verdict.as_expected else "yellow"
        table.add_row(verdict.what, str(verdict.count), verdict.expected, Text(verdict.found), style=style)
    return table
