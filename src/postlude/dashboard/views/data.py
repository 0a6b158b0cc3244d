"""The data of a stage: the losses of its examples over time, which are the worst and which were forgotten, how a step
is filled, and an example token by token."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from nicegui import ui

from postlude.dashboard import charts_records, frame, masks
from postlude.dashboard.followed import Followed
from postlude.dashboard.kept import kept
from postlude.dashboard.views.browse import Browse
from postlude.dashboard.views.drawing import Chart
from postlude.dashboard.views.tables import Cell, Link, Table
from postlude.errors import UserError
from postlude.manifest.lock import read_lock
from postlude.runs import Stage
from postlude.runs.losses import ExampleLosses, Losses, Order

ROWS = 20
WIDTH = 600
EVERY = "all sources"
_ORDERS: dict[Order, str] = {"worst": "the worst", "forgotten": "the forgotten"}


def _reader(stage: Stage) -> Losses:
    return Losses(stage.examples)


def _order(view: dict[str, str]) -> Order:
    return "forgotten" if view.get("order") == "forgotten" else "worst"


def _drawn(losses: Losses, view: dict[str, str]) -> dict[str, Any]:
    """What the view shows."""
    order = _order(view)
    source = view.get("source")
    page, search, chosen = frame.number(view, "page") or 0, view.get("search"), view.get("example")
    if search:
        found = [losses.example(example_id) for example_id in losses.containing(search, ROWS)]
        rows = [example for example in found if example]
    else:
        rows = losses.ranked(order, ROWS + 1, source, page * ROWS)
    return {
        "count": len(losses),
        "sources": losses.by_source(),
        "rows": rows,
        "chosen": losses.example(chosen) if chosen else None,
        "history": losses.history(chosen) if chosen else None,
    }


def _room(followed: Followed, stage: str) -> tuple[int | None, bool]:
    """How many tokens an optimiser step may have; and whether the stage makes them of answers."""
    text = followed.run.read_manifest_lock()
    told = read_lock(text, followed.run.manifest_lock).manifest["stages"].get(stage, {}) if text else {}
    batch = told.get("batch") or {}
    tokens, block = batch.get("tokens"), batch.get("block")
    return (tokens // block * block if tokens and block else None), "rollout" in told


class _DataPage(Browse[Losses, dict[str, Any]]):
    def __init__(self, followed: Followed, stage: str, view: dict[str, str]) -> None:
        super().__init__(kept(followed, stage, _reader), view)
        self.followed, self.stage, self.drawn_fill = followed, stage, -1
        self.none = frame.nothing("Reading ...")
        with ui.column().classes("w-full gap-4") as self.all:
            self.by_source = Chart("Loss by source, by token")
            self.sources = Table(["source", "examples", "losses told", "not finite"])
            self._controls()
            self.no_rows = frame.nothing("")
            heads = ["example", "source", "times", "first", "best", "at step", "last", "at step"]
            self.table = Table(heads)
            with ui.row().classes("items-center gap-2"):
                self.before = ui.button("Before", on_click=lambda: self._turn(-1)).props("flat dense")
                self.after = ui.button("After", on_click=lambda: self._turn(1)).props("flat dense")
            self.history = Chart("")
            self.no_example = frame.nothing("")
            self.ask: ui.element
            if frame.may_amend():
                self.ask = ui.button("Show its trained tokens", on_click=self._show_mask).props("flat dense")
            else:
                self.ask = frame.nothing("Who may amend the run can see which of its tokens are trained.")
            self.mask = ui.column().classes("w-full gap-2")
        self.fill = Chart("Packing fill")
        self.no_fill = frame.nothing("")

    def _controls(self) -> None:
        view = self.view
        with ui.row().classes("items-center gap-x-4 gap-y-1 w-full"):
            order = ui.toggle(dict(_ORDERS), value=_order(view))
            order.on_value_change(lambda event: self._set(order=None if event.value == "worst" else event.value))
            self.source = ui.select([EVERY], value=EVERY, label="Source").props("dense").classes("w-40")
            self.source.on_value_change(lambda event: self._set(source=None if event.value == EVERY else event.value))
            search = ui.input("Part of an id", value=view.get("search", "")).props("dense clearable debounce=300")
            search.on_value_change(lambda event: self._set(search=event.value))

    def _read(self, reader: Losses, view: dict[str, str]) -> dict[str, Any]:
        return _drawn(reader, view)

    async def refresh(self) -> None:
        await super().refresh()
        if self.followed.version != self.drawn_fill:
            self.drawn_fill = self.followed.version
            await self._show_fill()

    def _show(self, told: dict[str, Any]) -> None:
        self.all.set_visibility(bool(told["count"]))
        self.none.set_visibility(not told["count"])
        self.none.set_text(
            "No loss of an example is there: they are written at each checkpoint, by stages that train, and only where "
            "the objective has a loss for each document."
        )
        sources, rows = told["sources"], told["rows"]
        names = [source.source for source in sources]
        self.by_source.draw(charts_records.by_source(sources) if sources else None)
        self.sources.show(
            {s.source: [s.source, f"{s.examples:,}", f"{s.rows:,}", f"{s.not_finite:,}"] for s in sources}
        )
        chosen = self.view.get("source", EVERY)
        self.source.set_options([EVERY, *names], value=chosen if chosen in names else EVERY)
        self.table.show({row.example_id: _row(row, self.view) for row in rows[:ROWS]})
        self.no_rows.set_visibility(not rows)
        self.no_rows.set_text(self._why_none())
        self.before.set_visibility(bool(frame.number(self.view, "page")))
        self.after.set_visibility(len(rows) > ROWS)
        asked, example, history = self.view.get("example"), told["chosen"], told["history"]
        title = "" if example is None else f"{example.example_id}: its loss by token, of {example.times} times"
        self.history.draw(charts_records.history(history) if history is not None else None, title=title)
        self.no_example.set_visibility(history is None)
        self.ask.set_visibility(history is not None)
        self.no_example.set_text(
            f"There is no example '{asked}' among the losses."
            if asked
            else "Choose an example to see its whole history."
        )

    async def _show_mask(self) -> None:
        """Find out what of the chosen example is trained: that takes seconds."""
        example_id = self.view.get("example", "")
        self.mask.clear()
        with self.mask:
            frame.nothing("Looking for it in the data ...")
        try:
            documents = await masks.find(self.followed.run, self.stage, example_id)
            wrong = None if documents else f"The data have no example '{example_id}' any more."
        except (UserError, OSError) as error:
            documents, wrong = [], str(error)
        self.mask.clear()
        with self.mask:
            if wrong is not None:
                frame.warn(wrong)
            for document in documents:
                trained = sum(token["trained"] for token in document["tokens"])
                ui.label(f"{document['example_id']}: {len(document['tokens']):,} tokens, {trained:,} trained")
                ui.html(charts_records.mask_html(document["tokens"]), sanitize=False).classes(
                    "w-full whitespace-pre-wrap break-words font-mono text-sm"
                )

    def _why_none(self) -> str:
        if self.view.get("search"):
            return f"No id has '{self.view['search']}' in it."
        if self.view.get("order") == "forgotten":
            return "Nothing that was learned better than half of the examples has a higher loss now."
        return "No example of this source has a loss."

    async def _show_fill(self) -> None:
        def read() -> tuple[int | None, bool, Any]:
            room, is_online = _room(self.followed, self.stage)
            return room, is_online, self.followed.curve(self.stage, "tokens", WIDTH)

        room, is_online, curve = await asyncio.to_thread(read)
        name = "tokens of a step as a share of batch.tokens" if is_online else "share of its blocks that a step fills"
        is_told = room is not None and len(curve.steps) > 0
        self.fill.draw(
            charts_records.fill(curve.steps, curve.values, room or 1, name) if is_told else None,
            title=f"Packing fill: {name}",
        )
        self.no_fill.set_visibility(not is_told)
        self.no_fill.set_text("How full blocks are is not known: no step has told its tokens, or it packs nothing.")


def _row(example: ExampleLosses, view: dict[str, str]) -> Sequence[Cell]:
    return [
        Link(example.example_id, frame.address(view, example=example.example_id)),
        example.source,
        f"{example.times:,}",
        f"{example.first:.4f}",
        f"{example.best:.4f}",
        f"{example.best_step:,}",
        f"{example.last:.4f}",
        f"{example.last_step:,}",
    ]


def show(followed: Followed, stage: str | None, view: dict[str, str]) -> None:
    """The data of a stage."""
    if stage is None:
        frame.nothing("No stage has begun yet, so that nothing is known of its data.")
        return
    frame.refreshed(_DataPage(followed, stage, view).refresh)
