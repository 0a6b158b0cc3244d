"""The preflight of a stage that does not train: its data are read whole, and a few records go all the way.

Small random models stand in for the stage's. What comes out is written into the preflight's own run, where it
stands in for the data that the stage will make: so the stages after it are tried on records of the right shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from postlude.stages.models import TooLarge
from postlude.stages.parts import StageTask
from postlude.stages.run import finish
from postlude.stages.workbench import Workbench
from postlude.training.workers import Workers


@dataclass(frozen=True)
class Trial:
    """What the trial of a stage found."""

    counts: Mapping[str, Any]
    """Of the data, read whole."""
    made: Mapping[str, Any] | None
    """The report on what came out; None if it was not made."""
    note: str | None = None
    """Why it was not made, or not looked at."""

    def to_json(self) -> dict[str, Any]:
        return {"counts": dict(self.counts), "made": self.made, "note": self.note}

    def render(self) -> RenderableType:
        table = Table(show_header=False)
        for name, value in _flat(self.counts):
            table.add_row(name.replace("_", " "), f"{value:,.6g}" if isinstance(value, int | float) else str(value))
        if self.made is None:
            table.add_row("a small trial", f"not made: {self.note}")
        else:
            told = {name: value for name, value in self.made.items() if isinstance(value, int | float)}
            table.add_row("a small trial", ", ".join(f"{name} {value:,.6g}" for name, value in told.items()) or "made")
        return table


def try_out(task: StageTask, sample: int | None = None) -> Trial:
    """Count what a stage will work on, and let a few records go all the way. UserError for what would stop the run."""
    whole, bench = Workbench(task, Workers(), sample=sample), Workbench(task, Workers(), rehearses=True)
    whole.is_preflight = bench.is_preflight = True
    counts = whole.config.begin(whole).counts()
    work = bench.config.begin(bench)
    if not work.portions:
        return Trial(counts, None, "its models are not made yet, or it needs the whole of them")
    try:
        return Trial(counts, finish(bench, work, [work.do(portion) for portion in range(work.portions)]))
    except TooLarge as error:
        return Trial(counts, None, str(error))


def _flat(tree: Mapping[str, Any], above: str = "") -> list[tuple[str, Any]]:
    """The leaves of a tree by their path in words; counts of what is left out as one number."""
    leaves: list[tuple[str, Any]] = []
    for name, value in tree.items():
        path = f"{above} {name}".strip()
        if isinstance(value, Mapping) and set(value) == {"count", "examples"}:
            leaves.append((path, value["count"]))
        elif isinstance(value, Mapping):
            leaves += _flat(value, path)
        else:
            leaves.append((path, value))
    return leaves
