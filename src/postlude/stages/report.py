"""What a preflight finds out about a stage, for scripts and for people."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from postlude.data.statistics import Statistics
from postlude.data.synthetic import Verdict
from postlude.model.memory import MIB, MemoryPlan
from postlude.telemetry.screen import Fields, Listing
from postlude.training.precision import Precision


@dataclass(frozen=True)
class Rehearsal:
    """What the rehearsal of a stage that trains found."""

    plan: MemoryPlan
    precision: Precision
    loss: float | None
    """Of the small step; None if it was not made."""
    grad_norm: float | None
    expected_loss: float
    """Per token, of a model that knows nothing: the logarithm of the vocabulary."""

    def to_json(self) -> dict[str, Any]:
        return {
            "memory": self.plan.to_json(),
            "precision": vars(self.precision),
            "loss": self.loss,
            "grad_norm": self.grad_norm,
            "log_vocabulary": self.expected_loss,
        }

    def render(self) -> Fields:
        rows = [("parameters", f"{self.plan.parameters:,}")]
        if self.plan.trained != self.plan.parameters:
            rows.append(("trained", f"{self.plan.trained:,}"))
        for part in (
            "base",
            "weights",
            "gathered",
            "gradients",
            "optimizer",
            "activations",
            "head",
            "checkpoint",
            "peak",
        ):
            if size := getattr(self.plan, f"{part}_bytes"):
                rows.append((part, f"{size / MIB:,.1f} MiB"))
        rows.append(("precision", f"{self.precision.name} ({self.precision.reason})"))
        step = "not made: the model is too large for this machine"
        if self.loss is not None:
            step = f"loss {self.loss:z.3f}, gradient norm {self.grad_norm:.3g}"
        rows += [("one small step", step), ("log of the vocabulary", f"{self.expected_loss:.3f}")]
        return Fields("One worker", rows)


@dataclass(frozen=True)
class Trial:
    """What the trial of a stage found that does not train, or that answers prompts."""

    counts: Mapping[str, Any]
    """Of the data, read whole."""
    made: Mapping[str, Any] | None
    """The report on what came out; None if it was not made."""
    note: str | None = None
    """Why it was not made, or not looked at."""

    def to_json(self) -> dict[str, Any]:
        return {"counts": dict(self.counts), "made": self.made, "note": self.note}

    def render(self) -> Fields:
        rows = [
            (name.replace("_", " "), f"{value:,.6g}" if isinstance(value, int | float) else str(value))
            for name, value in _leaves(self.counts)
        ]
        made = f"not made: {self.note}"
        if self.made is not None:
            numbers = {name: value for name, value in self.made.items() if isinstance(value, int | float)}
            made = ", ".join(f"{name} {value:,.6g}" for name, value in numbers.items()) or "made"
        return Fields("", [*rows, ("a small trial", made)])


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
    unprinted: dict[str, dict[str, int]] = field(default_factory=dict)
    """What chat templates leave out of data sets, each with the number of examples, beside what their
    ``drop_unprinted`` names."""
    remarks: list[str] = field(default_factory=list)
    """What is not wrong, but should be known before training."""
    synthetic: dict[str, list[Verdict]] = field(default_factory=dict)

    def leave_out(self, dataset: str, counts: Mapping[str, int], accepted: Collection[str] | None) -> None:
        """Take up in how many examples of a data set a template leaves out what, but for what is accepted."""
        for kind in sorted(counts.keys() - set(accepted or ())):
            told = self.unprinted.setdefault(dataset, {})
            told[kind] = max(told.get(kind, 0), counts[kind])

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
            "unprinted": self.unprinted,
            "remarks": self.remarks,
            "synthetic": {name: [v.to_json() for v in verdicts] for name, verdicts in self.synthetic.items()},
        }

    def render(self) -> list[RenderableType]:
        parts: list[RenderableType] = [
            Text.assemble((self.stage, "bold"), f": workers {self.workers}, threads of each {self.threads}")
        ]
        parts += self.statistics.tables() if self.statistics else []
        parts += [Text(f"Held out: {name}, documents {count:,}") for name, count in self.held_out.items()]
        parts += [_synthetic_table(name, verdicts) for name, verdicts in self.synthetic.items()]
        parts += [part.render() for part in (self.trial, self.rehearsal) if part]
        parts += [Text(f"Not there yet: {name}, which '{maker}' makes.") for name, maker in self.awaited.items()]
        parts += [
            Text(
                f"The chat template does not print all that {name} holds: "
                f"{', '.join(f'{kind} (of {count:,})' for kind, count in kinds.items())}. Give one that does as "
                f"data.{name}.template, or say that it may with data.{name}.drop_unprinted.",
                "yellow",
            )
            for name, kinds in self.unprinted.items()
        ]
        parts += [Text(f"Note: {remark}", "yellow") for remark in self.remarks]
        return parts


def _leaves(tree: Mapping[str, Any], above: str = "") -> list[tuple[str, Any]]:
    """The leaves of a tree by their path in words; counts of what is left out as one number."""
    leaves: list[tuple[str, Any]] = []
    for name, value in tree.items():
        path = f"{above} {name}".strip()
        if isinstance(value, Mapping) and set(value) == {"count", "examples"}:
            leaves.append((path, value["count"]))
        elif isinstance(value, Mapping):
            leaves += _leaves(value, path)
        else:
            leaves.append((path, value))
    return leaves


def _synthetic_table(name: str, verdicts: Sequence[Verdict]) -> Listing:
    listing = Listing(
        f"{name}: synthetic records", {"record": "text", "count": "number", "expected": "text", "came out": "text"}
    )
    for verdict in verdicts:
        style = None if verdict.as_expected else "yellow"
        listing.add_row(verdict.what, f"{verdict.count:,}", verdict.expected, verdict.found, style=style)
    return listing
