"""Stages at work: on a group of workers each, side by side, or in this very process where a debugger can follow."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from postlude import storage
from postlude.cluster.providers.base import Provider
from postlude.errors import UserError
from postlude.manifest.alarms import AlarmRule
from postlude.manifest.amend import rules_by_step
from postlude.manifest.load import Resolved
from postlude.manifest.problem import ManifestError
from postlude.runs import Run, final_account
from postlude.secrecy import stripped_all
from postlude.stages.task import StageTask
from postlude.telemetry import events
from postlude.telemetry.alarms import left_behind
from postlude.telemetry.progress import StageProgress, say
from postlude.training.interruption import Interruption
from postlude.workflow.begin import begin, identity_now, make_room, try_take_over, verify_inputs, verify_paths
from postlude.workflow.compute import engines_of, pool_of, threads_of
from postlude.workflow.plan import Decision

if TYPE_CHECKING:
    from postlude.cluster.supervisor import Supervisor

FUNCTION = "postlude.stages.stage:run_stage"

_POLL_SECONDS = 0.5


class StagesAtWork:
    """Takes decisions to their ends. Once a stage fails or is asked to stop nothing begins any more; what is at work
    goes on to its end, or to a checkpoint where the request reached it. Without a ``cluster`` stages run here."""

    def __init__(self, run: Run, resolved: Resolved, cluster: Provider | None, stop: Interruption) -> None:
        self.run, self.resolved, self.cluster, self.stop = run, resolved, cluster, stop
        self.decisions: dict[str, Decision] = {}
        """The stages that are at work on groups of workers."""
        self.failure: Exception | None = None
        self.interrupted: str | None = None
        """The stage that was asked to stop."""
        self._at_work: dict[str, tuple[Supervisor, Future[Any]]] = {}
        """Of each the supervisor, and the thread's word when it has ended."""
        self._threads = ThreadPoolExecutor(thread_name_prefix="supervisor")

    @property
    def stopping(self) -> bool:
        """Whether nothing may begin any more."""
        return bool(self.failure or self.interrupted or self.stop.requested)

    def run_here(self, decision: Decision) -> None:
        """Run one stage to its end in this process."""
        from postlude.stages.stage import run_stage_here

        self._verify(decision)
        if self._needs_no_work(decision):
            return
        try:
            summary = run_stage_here(self._task(decision, inline=True), self.stop)
        except BaseException as error:
            self._end(decision, error=error)
        else:
            self._end(decision, summary)

    def start(self, decision: Decision, alone: bool) -> None:
        """Start a stage on a group of workers; only one that is ``alone`` draws a live line."""
        try:
            self._verify(decision)
            if self._needs_no_work(decision):
                return
        except UserError as error:
            self.failure = self.failure or error
            return
        progress = StageProgress(decision.stage, live=alone)
        supervisor = self._supervisor(decision, progress)

        def supervise() -> Any:
            with progress, self._engines(decision, lambda: supervisor.stopping):
                return supervisor.run()

        self.decisions[decision.stage] = decision
        self._at_work[decision.stage] = supervisor, self._threads.submit(supervise)

    def wait(self) -> None:
        """Wait until a stage at work has ended, or a moment; of those that have ended, note how."""
        if self.stop.requested:
            for supervisor, _ in self._at_work.values():
                supervisor.stop()
        wait([future for _, future in self._at_work.values()], _POLL_SECONDS, FIRST_COMPLETED)
        for name, future in [(name, future) for name, (_, future) in self._at_work.items() if future.done()]:
            del self._at_work[name]
            decision, error = self.decisions.pop(name), future.exception()
            results = future.result() if error is None else None
            self._end(decision, results[0] if results else None, error)
            if self.failure and self._at_work:
                names = ", ".join(self._at_work)
                say(f"{name} failed; {names} goes on to its end. An interrupt stops it at a checkpoint.")

    def close(self) -> None:
        """Kill whatever is still at work."""
        for supervisor, _ in self._at_work.values():
            supervisor.abandon()
        self._threads.shutdown()

    def _verify(self, decision: Decision) -> None:
        """Read what the stage is made of. :class:`UserError` if an artifact is not what was committed."""
        verify_inputs(self.run, decision.stage, decision.needs)
        verify_paths(self.resolved.manifest, decision.stage)

    def _needs_no_work(self, decision: Decision) -> bool:
        """Prepare the stage; whether it is done with that, because another run made it."""
        make_room(self.run, decision)
        identity = identity_now(self.resolved, self.run, decision)
        if try_take_over(self.run, decision, identity):
            return True
        begin(self.run, decision, identity)
        self._close_alarms(decision.stage)  # what a killed process left
        self.run.stage(decision.stage).enter("running", process=os.getpid(), **_identity_details(self.run, decision))
        return False

    def _task(self, decision: Decision, inline: bool = False) -> StageTask:
        manifest = self.resolved.manifest
        threads = threads_of(manifest, decision.stage, inline)
        guard = storage.shared_guard(self.run.uri)
        task = StageTask(self.resolved.tree, decision.stage, self.run.uri, threads, guard=guard)
        pool = engines_of(manifest, manifest.stages[decision.stage])
        if pool is None:
            return task
        if inline:
            raise ManifestError(
                f"stages.{decision.stage}: its engines have a pool of their own, and with --inline all is one process. "
                "Leave --inline out, or 'rollout.pool'."
            )
        from postlude.cluster.engines import host_names

        return replace(task, engines=host_names(self._job_name(decision), pool.most))

    def _job_name(self, decision: Decision) -> str:
        return f"{decision.stage}@{stripped_all(self.run.uri)}"  # Ray writes it into its logs

    def _engines(self, decision: Decision, give_up: Callable[[], bool]) -> AbstractContextManager[None]:
        """The hosts of a stage's engines, where these have a pool of their own."""
        from postlude.cluster.engines import engine_hosts
        from postlude.cluster.placement import Demand
        from postlude.cluster.worker import WorkerSetup

        manifest, name = self.resolved.manifest, decision.stage
        pool, compute = engines_of(manifest, manifest.stages[name]), manifest.compute
        if pool is None:
            return nullcontext()
        threads = pool.cpus_per_worker or threads_of(manifest, name)
        setup = WorkerSetup(name, threads, compute.variables())
        seconds, demand = float(compute.supervision.room_seconds), Demand.of(compute, pool)
        return engine_hosts(self._job_name(decision), demand, pool.most, setup, seconds, give_up)

    def _supervisor(self, decision: Decision, progress: StageProgress) -> Supervisor:
        from postlude.cluster.placement import Demand
        from postlude.cluster.supervisor import Job, Supervisor
        from postlude.cluster.watch import Observer
        from postlude.cluster.worker import WorkerSetup

        assert self.cluster is not None
        manifest, name = self.resolved.manifest, decision.stage
        compute, pool = manifest.compute, pool_of(manifest, manifest.stages[name])
        task, stage = self._task(decision), self.run.stage(name)
        job = Job(
            name=self._job_name(decision),
            function=FUNCTION,
            task=task,
            demand=Demand.of(compute, pool),
            least=pool.least,
            most=pool.most,
            setup=WorkerSetup(name, task.threads, compute.variables(), [FUNCTION.partition(":")[0]]),
            limits=compute.supervision,
            interface=self.cluster.interface,
        )

        def tell(kind: str, **fields: Any) -> None:
            progress.event(events.record(self.run.events, kind, name, **fields))

        seconds = compute.supervision.readings_seconds
        observer = Observer(stage.readings, tell, seconds, lambda step: self._rules(name, step))
        return Supervisor(job, stage.committed, tell, lambda look: look.relayed.show(progress), observer)

    def _rules(self, name: str, step: int | None = None) -> list[AlarmRule]:
        """The rules for alarms that hold at a step of a stage, after all amendments where none is given."""
        rules = rules_by_step(self.resolved.manifest, name, self.run.stage(name).applied_amendments())
        return rules[max(first for first in rules if step is None or first <= step)]

    def _close_alarms(self, name: str) -> None:
        """Tell that alarms to whose end nobody looks any more are over."""
        happened: list[events.Event] = []
        with suppress(storage.CorruptError):
            happened = events.read(self.run.events)
        for kind, fields in left_behind(self._rules(name), name, happened):
            events.record(self.run.events, kind, name, **fields)

    def _end(self, decision: Decision, summary: Any = None, error: BaseException | None = None) -> None:
        """Note how a stage ended: with a summary, with an error, or, with neither, asked to stop before it began.

        What a debugger or a second interrupt raised goes on from here."""
        stage, details = self.run.stage(decision.stage), _identity_details(self.run, decision)
        if not isinstance(error, storage.StorageError):
            self._close_alarms(decision.stage)
        if isinstance(error, Exception):
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            stage.enter("failed", error=reason.splitlines()[0], **details)
            events.record(self.run.events, "failure", decision.stage, error=reason)
            self.failure = self.failure or error
        elif error is not None or summary is None or summary.interrupted:
            stage.enter("interrupted", **details)
            self.interrupted = self.interrupted or decision.stage
            if error is not None:
                raise error
        else:
            stage.enter("done", steps=summary.steps, account=final_account(stage, self.run.events), **details)


def _identity_details(run: Run, decision: Decision) -> dict[str, Any]:
    identity = run.stage(decision.stage).identity()
    return {"fingerprint": identity.fingerprint, "revision": identity.revision} if identity else {}
