"""Changing a run: amendments, with what one means before it is asked for and the step from which it held; a checkpoint
now; a stop; alarms that are known.

Only who may amend gets the controls: what is not built cannot be called. Everything goes through the functions of the
command line, in threads, and what they refuse is told.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from nicegui import ui

from postlude.dashboard import frame
from postlude.dashboard.followed import Followed
from postlude.dashboard.views.tables import Table
from postlude.errors import UserError
from postlude.runs import Request
from postlude.telemetry.alarms import Standing
from postlude.workflow.acknowledge import acknowledge
from postlude.workflow.amend import Preview, Steering, amend, asker, look, preview, preview_undo, undo
from postlude.workflow.checkpoint import ask_for_checkpoint
from postlude.workflow.detached import stop

STOP_SECONDS = 600.0


def show(followed: Followed, stage: str | None, view: dict[str, str]) -> None:
    """What may be changed of a stage, and of the run that it stands in."""
    if stage is None:
        frame.nothing("No stage has begun, so there is nothing to change yet.")
        return
    _Panel(followed, stage, frame.may_amend())


class _Panel:
    """The view of one stage in one tab."""

    def __init__(self, followed: Followed, stage: str, may_amend: bool) -> None:
        self.followed, self.stage, self.uri, self.may_amend = followed, stage, followed.run.uri, may_amend
        self._client = ui.context.client
        self.steering: Steering | None = None
        self._seen: object = None
        self._standing: list[Standing] = []
        if not may_amend:
            frame.nothing("This address only looks: the one that changes runs was printed beside it.")
        self._refusal = frame.nothing("")
        if may_amend:
            self._controls()
        self._head("Alarms")
        self._alarms = ui.column().classes("w-full gap-1")
        self._head("Amendments")
        self._made = ui.column().classes("w-full gap-1")
        self._head("Every key, and whether it may change while the stage runs")
        self._keys = Table(["key", "value", "from the next", "what it changes, or why it may not"])
        self._show_alarms([])
        self._show_made([])
        frame.refreshed(self.refresh)

    async def refresh(self) -> None:
        """Show what came."""
        standing = self.followed.status.standing if self.followed.status else []
        if standing != self._standing:
            self._standing = list(standing)
            self._show_alarms(self._standing)
        try:
            seen = await asyncio.to_thread(self._marks)
            if seen == self._seen:
                return
            self.steering = await asyncio.to_thread(look, self.uri, self.stage)
        except (UserError, OSError) as error:
            self._refusal.set_text(str(error))
            return
        self._seen = seen
        self._refusal.set_text(self.steering.refusal or "")
        keys = sorted(self.steering.keys, key=lambda each: not each.change.allowed)
        rows = {each.key: [each.key, _shown(each.value), each.change.holds, each.change.text] for each in keys}
        self._keys.show(rows)
        if self.may_amend:
            self._key.set_options([each.key for each in self.steering.keys if each.change.allowed])
        self._show_made(self.steering.amendments)

    def _marks(self) -> object:
        """What changes with whatever this view shows of the stage."""
        of_stage = self.followed.run.stage(self.stage)
        return of_stage.amendments.size_bytes(), of_stage.status().state, self.followed.run.holder()

    # --- what is there to be changed ------------------------------------------------------------------------

    def _controls(self) -> None:
        with ui.row().classes("items-end gap-3 flex-wrap w-full"):
            self._key = ui.select([], label="Key", with_input=True, on_change=self._take_value).classes("w-64")
            self._value = ui.input("Value").classes("w-48")
            ui.button("Show what it means", on_click=self._preview)
        with ui.row().classes("gap-3 flex-wrap"):
            ui.button("Checkpoint now", on_click=self._checkpoint).props("outline")
            ui.button("Stop with a checkpoint", on_click=self._ask_to_stop).props("outline color=negative")

    def _take_value(self) -> None:
        keys = self.steering.keys if self.steering else []
        self._value.set_value(next((_shown(each.value) for each in keys if each.key == self._key.value), ""))

    async def _preview(self) -> None:
        assignment = f"{self._key.value or ''}={self._value.value or ''}"
        told = await self._try(preview, self.uri, self.stage, assignment)
        if isinstance(told, Preview):
            self._confirm(told, lambda: self._try(amend, self.uri, self.stage, assignment, seen=told.seen, by=_by()))

    async def _preview_undo(self, number: int) -> None:
        told = await self._try(preview_undo, self.uri, self.stage, number)
        if isinstance(told, Preview):
            self._confirm(told, lambda: self._try(undo, self.uri, self.stage, number, seen=told.seen, by=_by()))

    def _confirm(self, told: Preview, do: Callable[[], Awaitable[Any]]) -> None:
        """Show the manifest's difference and what it means, and do it once that is confirmed."""
        lines = [
            f"- stages.{told.stage}.{told.key}: {_shown(told.before)}",
            f"+ stages.{told.stage}.{told.key}: {_shown(told.after)}",
            "",
            f"From the next {told.holds} on, step {told.earliest_step:,} at the earliest: {told.effect}.",
        ]
        self._ask(lines, "Amend", do, "It is asked for.")

    def _ask_to_stop(self) -> None:
        lines = ["The run saves its state after the step in progress and ends. `postlude run` goes on from there."]
        self._ask(lines, "Stop", lambda: self._try(stop, self.uri, False, STOP_SECONDS), "It has stopped.")

    def _ask(self, lines: Sequence[str], title: str, do: Callable[[], Awaitable[Any]], done: str) -> None:
        with ui.dialog() as dialog, ui.card().classes("max-w-full"):
            ui.label("\n".join(lines)).classes("whitespace-pre-wrap break-words font-mono text-sm")

            async def go() -> None:
                dialog.close()
                if await do() is not None:
                    self._say(done)

            with ui.row():
                ui.button(title, on_click=go)
                ui.button("Leave it", on_click=dialog.close).props("flat")
        dialog.on("hide", dialog.delete)
        dialog.open()

    async def _checkpoint(self) -> None:
        if await self._try(ask_for_checkpoint, self.uri, self.stage, _by()) is not None:
            self._say("It is asked for: the checkpoint comes after the step in progress.")

    async def _acknowledge(self, name: str) -> None:
        if (told := await self._try(acknowledge, self.uri, [name])) is not None:
            self._say(told)

    async def _try(self, act: Callable[..., Any], *arguments: Any, **keys: Any) -> Any:
        """What an action returns; None, with a word of why, where it is refused."""
        try:
            return await asyncio.to_thread(act, *arguments, **keys)
        except (UserError, OSError) as error:
            self._say(str(error), type="negative", multi_line=True, timeout=0, close_button="Close")
            return None

    def _say(self, text: str, **options: Any) -> None:
        with self._client:  # the dialog or the row whose button was pressed may be gone by now
            ui.notify(text, **options)

    # --- what stands ----------------------------------------------------------------------------------------

    def _head(self, text: str) -> None:
        ui.label(text).classes("font-bold")

    def _show_alarms(self, standing: Sequence[Standing]) -> None:
        self._alarms.clear()
        with self._alarms:
            for each in standing:
                with ui.row().classes("items-center gap-3"):
                    over = "" if each.over is None else " (over)"
                    ui.label(f"{each.alarm.stage or 'run'}: {each.alarm.what}: {each.alarm.reason}{over}")
                    if each.acknowledged:
                        ui.label("acknowledged").classes("opacity-70")
                    elif self.may_amend:
                        what = each.alarm.what
                        button = ui.button("Acknowledge", on_click=lambda what=what: self._acknowledge(what))
                        button.props("outline dense")
            if not standing:
                frame.nothing("No alarm stands.")

    def _show_made(self, made: Sequence[Request]) -> None:
        undone = {each.undoes for each in made}
        self._made.clear()
        with self._made:
            for each in reversed(made):
                with ui.row().classes("items-center gap-3"):
                    ui.label(f"{each.number}: {each.assignment}").classes("font-mono")
                    ui.label(_since(each, self.steering)).classes("text-sm")
                    ui.label(f"{each.by or 'unknown'}, {frame.ago(each.time)}").classes("text-sm opacity-70")
                    if each.number in undone:
                        ui.label("undone").classes("text-sm opacity-70")
                    elif self.may_amend and self.steering and self.steering.refusal is None:
                        number = each.number
                        button = ui.button("Undo", on_click=lambda number=number: self._preview_undo(number))
                        button.props("outline dense")
            if not made:
                frame.nothing("Nothing was amended.")


def _since(request: Request, steering: Steering | None) -> str:
    undoes = "" if request.undoes is None else f", undoes {request.undoes}"
    if request.from_step is not None:
        return f"from step {request.from_step:,}{undoes}"
    late = steering is not None and steering.state == "done"
    return ("came too late" if late else "waits") + undoes


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _by() -> str:
    return f"{asker()} (page)"
