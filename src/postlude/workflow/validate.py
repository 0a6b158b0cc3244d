"""``postlude validate``: a preflight without a GPU, stopped by the first thing that would stop the run.

For each stage: its data are read, rendered, masked and packed; its memory is planned; and one real optimiser step
is made on this machine's CPU, with a model of the same architecture made small where it is large.
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
from postlude.manifest.errors import UserError
from postlude.manifest.load import Resolved, load
from postlude.recipes.assembly import Assembly, StageTask
from postlude.recipes.rehearsal import Rehearsal, rehearse
from postlude.training.workers import Workers
from postlude.workflow.compute import check_compute, cores, ranks_of, threads_of
from postlude.workflow.run import stages_in_order


@dataclass
class StageReport:
    """What the preflight found out about one stage."""

    stage: str
    workers: int
    threads: int
    statistics: Statistics
    rehearsal: Rehearsal
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
            "data": self.statistics.to_json(),
            "held_out_documents": self.held_out,
            "step": self.rehearsal.to_json(),
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
            parts += stage.statistics.tables()
            parts += [Text(f"Held out: {name}, documents {n:,}") for name, n in stage.held_out.items()]
            parts += [_synthetic_table(name, verdicts) for name, verdicts in stage.synthetic.items()]
            parts += [stage.rehearsal.render(), *(Text(f"Note: {remark}", "yellow") for remark in stage.remarks)]
        parts += [Text(str(self.error), "red") if self.error else Text("Everything is in order.", "green")]
        return Group(*parts)


def validate(
    manifest_path: str, overrides: Sequence[str], sample: int | None = None, synthetic: int | None = None
) -> Report:
    """The preflight of a manifest. ``sample`` reads only so many records of each data set; ``synthetic`` also
    sends so many made-up records of each format through the pipeline. What is wrong is in the report, not raised.
    """
    report = Report(manifest_path)
    try:
        resolved = load(storage.read_bytes(manifest_path), manifest_path, overrides)
        check_compute(resolved.manifest)
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
    assembly = Assembly(task, Workers(), sample=sample)
    made_up: dict[str, list[Verdict]] = {}
    if synthetic:
        for data, source in assembly.sources.items():
            format: Any = resolved.manifest.data[data].format
            made_up[data] = try_synthetic(format, source.encoder.encode, synthetic, resolved.manifest.seed)
    statistics = measure(
        assembly.sources,
        assembly.config.data,
        seed=resolved.manifest.seed,
        block=assembly.config.batch.block,
        window=assembly.config.batch.window,
        rows={name: dataset.rows for name, dataset in assembly.datasets.items()},
    )
    held_out = {
        name: sum(len(unit.documents) for block in blocks for unit in block)
        for name, blocks in assembly.evaluations.items()
    }
    rehearsal = rehearse(assembly)
    remarks = [remark for source in assembly.conversations.values() for remark in source.encoder.remarks]
    threads = threads_of(config, workers)
    return StageReport(name, workers, threads, statistics, rehearsal, held_out, remarks, made_up)


def _synthetic_table(name: str, verdicts: Sequence[Verdict]) -> Table:
    table = Table(title=f"{name}: synthetic records", title_justify="left")
    for column in ("record", "count", "expected", "came out"):
        table.add_column(column, justify="right" if column == "count" else "left")
    for verdict in verdicts:
        style = None if verdict.as_expected else "yellow"
        table.add_row(verdict.what, str(verdict.count), verdict.expected, Text(verdict.found), style=style)
    return table
