"""``postlude run``: the stages of a manifest in the order of their dependencies, each resumed where it stopped."""

from __future__ import annotations

import os
import shlex
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from functools import partial
from typing import Any

from postlude import storage
from postlude.cluster.budget import Budget
from postlude.cluster.fork_server import fork_server
from postlude.cluster.keeper import Stopped, keep
from postlude.cluster.providers.base import Provider, open_cluster, provider_of
from postlude.manifest.assignments import handed_on
from postlude.manifest.load import Resolved
from postlude.manifest.lock import LockedStage, dump_lock, read_lock
from postlude.manifest.lock import lock as manifest_lock
from postlude.manifest.problem import ManifestError
from postlude.manifest.schema import Manifest, TrainingStage
from postlude.manifest.value import without_value
from postlude.runs import Run, revision_of
from postlude.runs.schemas import AmendmentLine
from postlude.telemetry import events
from postlude.telemetry.notify import notifying
from postlude.telemetry.progress import StageProgress, console, say, stage_table
from postlude.telemetry.tracking import sinks_of, tracking
from postlude.training.interruption import Interruption
from postlude.workflow.begin import mend_identity, mend_records, verify_inputs, verify_kept
from postlude.workflow.compute import check_compute, threads_of
from postlude.workflow.holding import hold, looking_after, must_leave
from postlude.workflow.manifest import open_manifest
from postlude.workflow.plan import Decision, Plan, Standing, make_plan
from postlude.workflow.selection import Selection
from postlude.workflow.side_by_side import FUNCTION, StagesAtWork

INTERRUPTED = 130


def run(
    manifest_path: str,
    overrides: Sequence[str],
    stage: str | None = None,
    inline: bool = False,
    begin: str | None = None,
    until: str | None = None,
    wait_seconds: float = 0.0,
) -> int:
    """Run a manifest, or the stages of it that are selected, and return the exit code of the command.

    What is done and why is the plan of :mod:`postlude.workflow.plan`. ``inline`` runs every stage in this process, one
    after another, for a debugger. ``wait_seconds``: how long to wait for another process that holds the run.
    :class:`UserError` on what the user can mend; the run can be continued.
    """
    resolved = open_manifest(manifest_path, [*overrides, *handed_on()])
    check_compute(resolved.manifest)
    run = run_of(resolved)
    sinks_of(resolved.manifest.sinks, run.uri)  # what cannot work is told before anything is done
    with hold(run, wait_seconds) as lock:
        mend_records(run)
        plan = make_plan(resolved, run, Selection(stage, begin, until))
        console().print(plan.render())
        check_what_stands(run, plan)
        needs_workers = bool(plan.work) and not inline
        starts_ray = needs_workers and provider_of(resolved.manifest.compute).starts_ray
        with forking(resolved.manifest) if starts_ray else nullcontext():
            if starts_ray and "ray" not in sys.modules:
                interrupted = keep_at_work(run, resolved, plan, Selection(stage, None, until), lock)
            else:
                interrupted = work(run, resolved, plan, needs_workers, lock)
        if interrupted is not None:
            reason = lock.leaving or f"asked to stop in stage {interrupted}"
            events.record(run.events, "run_interrupted", reason=reason)
            chosen = {"--stage": stage, "--until": until}
            options = [part for name, value in chosen.items() if value is not None for part in (name, value)]
            repeated = map(without_value, overrides)
            command = ["postlude", "run", manifest_path, *repeated, *options, *["--inline"] * inline]
            how_to_go_on = f"{what_holds(run, plan)}. Go on with: {shlex.join(command)}"
            if lock.leaving:
                raise storage.LockedError(
                    f"{lock.leaving} Since others could take the run up, it has stopped: {how_to_go_on}"
                )
            say(f"Interrupted: {how_to_go_on}", whole=True)
            return INTERRUPTED
        events.record(run.events, "run_finished")
        stage_table(run, [decision.stage for decision in plan.decisions])
    return 0


def work(run: Run, resolved: Resolved, plan: Plan, needs_workers: bool, lock: storage.Lock | None) -> str | None:
    """Take a plan to its end in this process; the name of the stage that was asked to stop, if one was. Without a
    ``lock`` the process above this one looks after it."""
    with workers_for(resolved.manifest) if needs_workers else nullcontext() as cluster:
        write_lock(run, resolved, plan)
        holder = run.holder()  # the parent of this process, where that keeps it at work
        pid = holder.pid if holder else os.getpid()
        events.record(run.events, "run_started", host=socket.gethostname(), pid=pid, amendments=AmendmentLine.version)
        manifest = resolved.manifest
        trains = {name: isinstance(stage, TrainingStage) for name, stage in manifest.stages.items()}
        sinks = sinks_of(manifest.sinks, run.uri)
        with (
            notifying(run, manifest.notify),
            tracking(run, sinks, trains, resolved.tree, manifest.compute.variables()),
        ):
            return execute(run, resolved, plan, cluster, lock)


def keep_at_work(run: Run, resolved: Resolved, plan: Plan, go_on: Selection, lock: storage.Lock) -> str | None:
    """:func:`work` in a process below this one, and in another that goes on with what ``go_on`` selects when that, or a
    process of Ray's own, has died."""

    def do(lost: int) -> str | None:
        storage.set_guard(run.uri, lock.shared())
        mine = Run(run.uri)  # a journal far away has a writer of its own in each process
        now = what_is_left(mine, resolved, plan, go_on) if lost else plan
        return work(mine, resolved, now, needs_workers=True, lock=None) if now.work else None

    def tell(kind: str, **fields: Any) -> None:
        shown.event(events.record(run.events, kind, **fields))

    shown = StageProgress(run.name, live=False)
    stages = [run.stage(decision.stage) for decision in plan.work]
    budget = Budget(resolved.manifest.compute.supervision, lambda: [stage.committed() for stage in stages])
    try:
        return keep(do, budget, tell, partial(must_leave, lock))
    except Stopped:
        return next((stage.name for stage in stages if not stage.is_done()), None)


def forking(manifest: Manifest) -> AbstractContextManager[None]:
    """Have the workers of a run that have no GPU forked from one process, for as long as the context lasts."""
    compute = manifest.compute
    if compute.pools and all(pool.gpus_per_worker for pool in compute.pools.values()):
        return nullcontext()
    variables = {**provider_of(compute).defaults, **os.environ, **compute.variables(), "OMP_NUM_THREADS": "1"}
    return fork_server([FUNCTION.partition(":")[0]], variables)


def what_is_left(run: Run, resolved: Resolved, plan: Plan, go_on: Selection) -> Plan:
    """A plan that was begun as it is now: what was to be moved aside and is not yet still is."""
    now = {decision.stage: decision for decision in make_plan(resolved, run, go_on).decisions}
    return Plan(
        run,
        [
            decision
            if decision.replaces and revision_of(run, decision.stage) < decision.identity.revision
            else now[decision.stage]
            for decision in plan.decisions
        ],
    )


def check_what_stands(run: Run, plan: Plan) -> None:
    """Read what a plan builds upon or keeps. :class:`UserError` if an artifact is not what was committed."""
    made_anew, inputs = {decision.stage for decision in plan.work}, set()
    for decision in plan.work:
        needed = [need for need in decision.needs if need not in made_anew]
        verify_inputs(run, decision.stage, needed)
        inputs.update(needed)
    for decision in plan.decisions:
        if decision.action in ("keep", "resume"):
            mend_identity(run, decision)
    verify_kept(run, [name for name in (each.stage for each in plan.decisions) if name not in made_anew | inputs])


def what_holds(run: Run, plan: Plan) -> str:
    """In words, where each stage of a plan goes on that has begun and is not done."""
    holding = []
    for name in [decision.stage for decision in plan.work]:
        standing = Standing.at(run, name)
        if standing.begun and not standing.done:
            held = f"its checkpoint of step {standing.step:,}" if standing.step else "the portions that it has finished"
            holding.append(f"'{name}' holds {held}")
    return "; ".join(holding) or "no stage is unfinished"


def dry_run(
    manifest_path: str,
    overrides: Sequence[str],
    stage: str | None = None,
    begin: str | None = None,
    until: str | None = None,
) -> Plan:
    """What :func:`run` would do and why. Writes nothing, and can be asked while another process works on the run."""
    resolved = open_manifest(manifest_path, overrides)
    return make_plan(resolved, run_of(resolved), Selection(stage, begin, until))


def execute(
    run: Run, resolved: Resolved, plan: Plan, cluster: Provider | None, lock: storage.Lock | None
) -> str | None:
    """Take every decision of a plan to its end; the name of the stage that was asked to stop, if one was.

    A stage begins when all that it needs is done and its pool is free, on a group of workers of the cluster; without
    one the stages run in this process, one after another. What a stage raises is raised when the others at work have
    ended.
    """
    left = {decision.stage: decision for decision in plan.work}
    with (
        Interruption().listening() as stop,
        looking_after(lock, stop) if lock else nullcontext(),
        closing(StagesAtWork(run, resolved, cluster, stop)) as at_work,
    ):
        while (left and not at_work.stopping) or at_work.decisions:
            ready = [] if at_work.stopping else can_begin(left, at_work.decisions)
            for decision in ready if cluster else ready[:1]:
                del left[decision.stage]
                if cluster:
                    at_work.start(decision, alone=len(ready) == 1 and not at_work.decisions)
                else:
                    at_work.run_here(decision)
            if at_work.decisions:
                at_work.wait()
        if at_work.failure is not None:
            raise at_work.failure
        return at_work.interrupted or (next(iter(left), None) if stop.requested else None)


@contextmanager
def workers_for(manifest: Manifest) -> Iterator[Provider]:
    """The cluster that the manifest names, found to have the nodes and the network for its pools, or ComputeError."""
    with open_cluster(manifest.compute) as cluster:
        from postlude.cluster.bandwidth import check_bandwidth  # loads Ray, which reads its environment then
        from postlude.cluster.placement import check_topology

        check_topology(manifest.compute)
        check_bandwidth(manifest.compute)
        yield cluster


def can_begin(left: Mapping[str, Decision], at_work: Mapping[str, Decision]) -> list[Decision]:
    """The stages that wait for nothing: all they need is done, and their pools are free. One for each pool."""
    unfinished = {*left, *at_work}
    taken = {pool for decision in at_work.values() for pool in decision.pools}
    ready = []
    for decision in left.values():
        if not taken & set(decision.pools) and not unfinished & set(decision.needs):
            taken |= set(decision.pools)
            ready.append(decision)
    return ready


def run_of(resolved: Resolved) -> Run:
    """The run that a manifest describes."""
    return Run(storage.join(resolved.manifest.run_dir, resolved.manifest.name))


def write_lock(run: Run, resolved: Resolved, plan: Plan) -> None:
    """Write what the run is about to do as its manifest lock; stages outside the plan keep their fingerprints."""
    manifest = resolved.manifest
    threads = {name: threads_of(manifest, name) for name in manifest.stages}
    known: Mapping[str, LockedStage] = {}
    try:
        before = run.read_manifest_lock()
        known = read_lock(before, run.manifest_lock).stages if before is not None else {}
    except (storage.CorruptError, ManifestError) as error:
        say(f"{run.name}: the manifest lock is written anew: {error}")
        events.record(run.events, "alarm", what="manifest lock written anew", reason=str(error))
    fingerprints = {name: stage.fingerprint for name, stage in known.items() if stage.fingerprint is not None}
    fingerprints |= {decision.stage: decision.identity.fingerprint for decision in plan.decisions}
    run.write_manifest_lock(dump_lock(manifest_lock(resolved, threads, fingerprints)))
