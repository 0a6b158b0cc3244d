"""What will run and why: from a manifest and a run directory to one decision for each stage. Writes nothing.

A stage is kept where it is finished and would come out the same; it is resumed where it has begun so. A finished stage
of which anything changed runs again as a new revision, and so does all that hangs on it. What another run in the same
folder has finished with an equal fingerprint is taken over. A stage that has begun and is not finished refuses a change
of its own, unless one of its inputs is a new revision: then there is nothing left to go on with.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, Literal

from postlude.manifest.graph import ancestors, needs, order
from postlude.manifest.load import Resolved
from postlude.manifest.problem import ManifestError
from postlude.runs import Identity, Run, Stage, find_finished_elsewhere, known_identity, revision_of
from postlude.telemetry.screen import Listing
from postlude.workflow.compute import pools_of
from postlude.workflow.fingerprint import Identifier
from postlude.workflow.selection import Selection

Action = Literal["keep", "resume", "run", "run again", "take over", "refuse"]
"""``refuse`` is of a stage that has begun and cannot go on as the manifest has it."""


@dataclass(frozen=True)
class Standing:
    """What stands in a stage."""

    identity: Identity | None = None
    """What it was begun with, where it has begun and that is known."""
    begun: bool = False
    done: bool = False
    step: int = 0
    """Of the newest checkpoint."""
    revision: int = 1
    """Of what stands; of what it is going to make, where it has not begun."""
    amendments: Sequence[Sequence[Any]] = ()
    fingerprint: str | None = None
    """Of what it was begun with, as its state has it: enough where the identity itself is lost."""

    @staticmethod
    def at(run: Run, name: str) -> Standing:
        """What stands in a stage of a run."""
        stage = run.stage(name)
        number = revision_of(run, name)
        if not stage.has_begun():
            return Standing(revision=number)
        newest = next((checkpoint.step for checkpoint in stage.checkpoints()), 0)
        fingerprint = stage.status().details.get("fingerprint")
        amendments = stage.applied_amendments()
        return Standing(known_identity(stage), True, stage.is_done(), newest, number, amendments, fingerprint)

    def begun_with(self, wanted: Identity) -> Identity | None:
        """What it was begun with, where that is known, or known to be what is ``wanted`` now."""
        return wanted if self.identity is None and self.fingerprint == wanted.fingerprint else self.identity


@dataclass(frozen=True)
class Decision:
    """What becomes of one stage."""

    stage: str
    action: Action
    identity: Identity
    """What it will be begun with, or was."""
    needs: Sequence[str] = ()
    pools: Sequence[str] = ()
    """Those that it takes up, its own first."""
    step: int = 0
    """Where a resume goes on."""
    reasons: Sequence[str] = ()
    source: Stage | None = field(default=None, compare=False)
    """What is taken over."""
    replaces: bool = False
    """Whether what stands is moved to the revisions first."""

    def describe(self) -> str:
        """The decision in words."""
        match self.action:
            case "refuse":
                return "be refused"
            case "resume":
                return f"resume from step {self.step}"
            case "run again":
                return f"run again as revision {self.identity.revision}"
            case "take over" if self.source is not None:
                return f"take over from {self.source.run_name}"
        return self.action

    def to_json(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "action": self.action,
            "revision": self.identity.revision,
            "step": self.step,
            "reasons": list(self.reasons),
            "from_run": self.source.run_name if self.source else None,
            "needs": list(self.needs),
            "pool": self.pools[0],
            "fingerprint": self.identity.fingerprint,
        }


@dataclass(frozen=True)
class Plan:
    """The decisions, in graph order."""

    run: Run
    decisions: list[Decision]

    @property
    def work(self) -> list[Decision]:
        """Those by which something is done."""
        return [decision for decision in self.decisions if decision.action != "keep"]

    def __getitem__(self, stage: str) -> Decision:
        return next(decision for decision in self.decisions if decision.stage == stage)

    def to_json(self) -> dict[str, Any]:
        return {"run": self.run.uri, "stages": [decision.to_json() for decision in self.decisions]}

    def render(self) -> Listing:
        from postlude.workflow.drawing import draw

        listing = Listing(
            f"{self.run.name}: what will run", {"stage": "whole", "also needs": "text", "what and why": "text"}
        )
        for name, branch, others in draw({decision.stage: decision.needs for decision in self.decisions}):
            decision = self[name]
            why = f": {'; '.join(decision.reasons)}" if decision.reasons else ""
            style = "dim" if decision.action == "keep" else None
            listing.add_row(branch, others, decision.describe() + why, style=style)
        return listing


class Refused(ManifestError):
    """A stage that has begun was changed."""


def make_plan(resolved: Resolved, run: Run, selection: Selection) -> Plan:
    """What a run of the selected stages will do.

    :class:`Refused` with the differences if a stage that has begun and is not finished was changed; ManifestError for
    a selection that cannot be.
    """
    chosen = selection.stages(resolved.manifest)
    forced = selection.forced(resolved.manifest)
    needed = set(chosen).union(*(ancestors(resolved.manifest, name) for name in chosen))
    elsewhere = cache(partial(find_finished_elsewhere, run))
    decisions = decide(
        {name: needs(resolved.manifest, name) for name in order(resolved.manifest) if name in needed},
        Identifier(resolved, run),
        {name: Standing.at(run, name) for name in needed},
        lambda fingerprint: elsewhere().get(fingerprint),
        forced,
    )
    missing = [decision for decision in decisions if decision.stage not in chosen and decision.action != "keep"]
    if missing:
        raise ManifestError(
            f"--from {selection.begin}: what it needs is not finished as the manifest has it now: "
            + "; ".join(f"'{decision.stage}' would {decision.describe()}" for decision in missing)
            + f". Run it first with --until {missing[-1].stage}, or begin with --from {missing[0].stage}."
        )
    refused = [reason for decision in decisions if decision.action == "refuse" for reason in decision.reasons]
    if refused:
        raise Refused(
            f"The run '{run.uri}' has begun with another manifest, and a stage that has begun does not change:\n  "
            + "\n  ".join(dict.fromkeys(refused))
            + "\nUndo the change, give the run another name, begin the stage anew with --from, or change what may "
            "change while a stage runs with `postlude amend`."
        )
    decisions = [decision for decision in decisions if decision.stage in chosen]
    stages = resolved.manifest.stages
    return Plan(run, [replace(decision, pools=pools_of(stages[decision.stage])) for decision in decisions])


def decide(
    graph: Mapping[str, Sequence[str]],
    identify: Callable[[str, Mapping[str, str], Mapping[str, int]], Identity],
    standing: Mapping[str, Standing],
    elsewhere: Callable[[str], Stage | None] = lambda fingerprint: None,
    forced: Collection[str] = (),
) -> list[Decision]:
    """The decision for each stage of a graph (the stages that each needs, in order), given what stands."""
    decisions: list[Decision] = []
    results: dict[str, str] = {}
    revisions: dict[str, int] = {}
    for name, needed in graph.items():
        wanted = identify(name, {need: results[need] for need in needed}, {need: revisions[need] for need in needed})
        decision = _decide(name, needed, wanted, standing[name], elsewhere, name in forced)
        goes_on = decision.action in ("keep", "resume", "refuse")
        results[name] = decision.identity.result_fingerprint(standing[name].amendments if goes_on else ())
        revisions[name] = decision.identity.revision
        decisions.append(decision)
    return decisions


def _decide(
    name: str,
    needed: Sequence[str],
    wanted: Identity,
    standing: Standing,
    elsewhere: Callable[[str], Stage | None],
    is_forced: bool,
) -> Decision:
    reasons, inputs = [], []
    before = standing.begun_with(wanted)
    if standing.begun and before is None:
        reasons = ["what it was begun with is not known"]
    elif standing.begun and before is not None:
        inputs = before.changed_inputs(wanted)
        reasons = before.changes(wanted) + [f"the input {need} is a new revision" for need in inputs]
    if standing.begun and not reasons and not is_forced:
        action: Action = "keep" if standing.done else "resume"
        return Decision(name, action, replace(wanted, revision=standing.revision), needed, step=standing.step)
    if standing.begun and not standing.done and not inputs and not is_forced:
        return Decision(name, "refuse", replace(wanted, revision=standing.revision), needed, reasons=reasons)
    identity = replace(wanted, revision=standing.revision + standing.begun)
    source = None if is_forced else elsewhere(wanted.fingerprint)
    if source is not None:
        why = [*reasons, f"finished there with the same fingerprint {wanted.fingerprint[:12]}"]
        return Decision(name, "take over", identity, needed, reasons=why, source=source, replaces=standing.begun)
    if not standing.begun and standing.revision == 1:
        return Decision(name, "run", identity, needed, reasons=["it has not run yet"])
    if not standing.begun:
        reasons = ["the revision before it was moved aside"]
    elif is_forced:
        reasons = [*reasons, "asked for with --from"]
    return Decision(name, "run again", identity, needed, reasons=reasons, replaces=standing.begun)
