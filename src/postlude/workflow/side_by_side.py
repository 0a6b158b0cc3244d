"""Stages at work: one in this very process, where a debugger can follow it, or several as processes of their own."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Any

from postlude.cluster.local import RankFailed, RankGroup, attend, run_ranks, signals_handed_on
from postlude.manifest.errors import UserError
from postlude.manifest.load import Resolved
from postlude.recipes.parts import StageTask
from postlude.runs import Run
from postlude.telemetry import events
from postlude.telemetry.progress import say
from postlude.workflow.begin import begin, identity_now, make_room, taken_over, verify_inputs
from postlude.workflow.compute import devices_of, ranks_beside, ranks_of, threads_of
from postlude.workflow.plan import Decision

FUNCTION = "postlude.recipes.execution:run_stage"

PLAIN = {"TTY_COMPATIBLE": "0"}
"""What keeps several processes from drawing live lines on one terminal."""


class StagesAtWork:
    """Takes decisions to their ends. Once a stage fails or is asked to stop nothing begins any more; what is at work
    goes on to its end, or to a checkpoint where the signal reached it."""

    def __init__(self, run: Run, resolved: Resolved, inline: bool) -> None:
        self.run, self.resolved, self.inline = run, resolved, inline
        self.decisions: dict[str, Decision] = {}
        """The stages that are at work as processes of their own."""
        self.failure: Exception | None = None
        self.interrupted: str | None = None
        """The stage that was asked to stop."""
        self._groups: dict[str, RankGroup] = {}
        self._alive: list[RankGroup] = []
        self._signals: list[int] = []
        self._listening = ExitStack()

    @property
    def stopping(self) -> bool:
        """Whether nothing may begin any more."""
        return bool(self.failure or self.interrupted or self._signals)

    def run_here(self, decision: Decision) -> None:
        """Run one stage to its end while nothing else does."""
        verify_inputs(self.run, decision)
        if self._needs_no_work(decision):
            return
        task, ranks = self._task(decision)
        try:
            summary = run_ranks(FUNCTION, task, ranks, task.threads)[0]
        except BaseException as error:
            self._end(decision, error=error)
        else:
            self._end(decision, summary)

    def start(self, decision: Decision) -> None:
        """Start a stage as processes of its own, beside those at work."""
        try:
            verify_inputs(self.run, decision)
            if self._needs_no_work(decision):
                return
        except UserError as error:
            self.failure = self.failure or error
            return
        task, ranks = self._task(decision)
        config = self.resolved.manifest.stages[decision.stage]
        environment = {**devices_of(self.resolved.manifest, config), **PLAIN}
        if not self._groups:
            self._signals = self._listening.enter_context(signals_handed_on(self._alive))
        group = RankGroup(FUNCTION, task, ranks, task.threads, environment)
        self._alive.append(group)
        self._groups[decision.stage], self.decisions[decision.stage] = group, decision

    def wait(self) -> None:
        """Wait until a stage at work says something; of those that have ended, note how."""
        attend(self._alive)
        for name in [name for name, group in self._groups.items() if group.is_over]:
            group, decision = self._groups.pop(name), self.decisions.pop(name)
            try:
                with group:
                    summary = group.results()[0]
            except RankFailed as error:
                # A signal that comes before a rank listens ends it; there is nothing yet that could be lost.
                self._end(decision, error=KeyboardInterrupt() if self._signals else error)
            except UserError as error:
                self._end(decision, error=error)
            else:
                self._end(decision, summary)
            self._alive.remove(group)
            if self.failure and self._groups:
                names = ", ".join(self._groups)
                say(f"{name} failed; {names} goes on to its end. An interrupt stops it at a checkpoint.")
        if not self._groups:
            self._listening.close()

    def close(self) -> None:
        """Kill whatever is still at work, and listen to signals no more."""
        for group in self._groups.values():
            group.__exit__()
        self._listening.close()

    def _needs_no_work(self, decision: Decision) -> bool:
        """Prepare the stage; whether it is done with that, because another run made it."""
        make_room(self.run, decision)
        identity = identity_now(self.resolved, self.run, decision)
        if taken_over(self.run, decision, identity):
            return True
        begin(self.run, decision, identity)
        self.run.stage(decision.stage).enter("running", process=os.getpid(), **_said(self.run, decision))
        return False

    def _task(self, decision: Decision) -> tuple[StageTask, int]:
        manifest, name = self.resolved.manifest, decision.stage
        config = manifest.stages[name]
        ranks = 1 if self.inline else ranks_of(manifest, config)
        threads = threads_of(config, ranks, 0 if self.inline else ranks_beside(manifest, name))
        return StageTask(tree=self.resolved.tree, stage=name, run=self.run.uri, threads=threads), ranks

    def _end(self, decision: Decision, summary: Any = None, error: BaseException | None = None) -> None:
        """Note how a stage ended. What a debugger or a second interrupt raised goes on from here."""
        stage, said = self.run.stage(decision.stage), _said(self.run, decision)
        if isinstance(error, Exception):
            told = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            stage.enter("failed", error=told, **said)
            events.record(self.run.events, events.make("failure", decision.stage, error=told))
            self.failure = self.failure or error
        elif error is not None or summary.interrupted:
            stage.enter("interrupted", **said)
            self.interrupted = self.interrupted or decision.stage
            if error is not None and not self._signals:
                raise error
        else:
            stage.enter("done", steps=summary.steps, **said)


def _said(run: Run, decision: Decision) -> dict[str, Any]:
    identity = run.stage(decision.stage).identity()
    return {"fingerprint": identity.fingerprint, "revision": identity.revision} if identity else {}
