"""One stage: its curves, exact at every zoom, with what happened as marks on each."""

from __future__ import annotations

import asyncio
import base64
import csv
import io
from dataclasses import dataclass
from typing import Any

from nicegui import ui
from nicegui.events import GenericEventArguments

from postlude.dashboard import charts, frame
from postlude.dashboard.charts import Line
from postlude.dashboard.followed import Followed
from postlude.dashboard.views.drawing import Plot
from postlude.dashboard.views.tables import Table

WIDTH = 600
"""Pixel columns of a curve: what is sent of it is at most two values for each."""
MORE = 12
"""How many of the other metrics are drawn at once."""
_CONNECT = """
import("nicegui-echart").then(({echarts}) => {
  for (const id of %s) { const chart = getElement(id)?.chart; if (chart) chart.group = "stage"; }
  echarts.connect("stage");
});
"""


@dataclass
class _Card:
    """A chart with its title, and what is drawn there."""

    title: str
    names: list[str]
    why: str
    frame: ui.card
    nothing: ui.label
    buttons: ui.row
    chart: Plot
    is_drawn: bool = False
    is_ready: bool = False
    """Whether it has been told that dragging zooms, and that its tooltip follows the others'."""


class _StagePage:
    def __init__(self, followed: Followed, stage: str, view: dict[str, str]) -> None:
        self.followed, self.stage, self.view = followed, stage, view
        self.count = frame.number(view, "more") or MORE
        self.drawn: Any = None
        self.cards: dict[str, _Card] = {}
        self._controls()
        self.first_grid = self._grid()
        ui.label("Every other metric").classes("font-bold")
        self.none = frame.nothing("")
        self.other_grid = self._grid()
        self.more = ui.button("Show more", on_click=self._show_more).props("flat dense")
        with ui.expansion("Marks on the curves").classes("w-full"):
            self.no_marks = frame.nothing(
                "Nothing happened yet that is a mark: amendments, checkpoints, faults, alarms."
            )
            self.marks = Table(["step", "kind", "what", "when"])

    def _grid(self) -> ui.element:
        return ui.element("div").classes("grid grid-cols-1 lg:grid-cols-2 2xl:grid-cols-3 gap-4 w-full items-start")

    def _controls(self) -> None:
        view = self.view
        with ui.row().classes("items-center gap-x-4 gap-y-1 w-full"):
            search = ui.input("Search metrics", value=view.get("search", "")).props("dense clearable debounce=300")
            search.on_value_change(lambda event: self._set(search=event.value))
            smooth = ui.number("Mean over steps", value=frame.number(view, "over") or 1, min=1, step=1).props("dense")
            smooth.on_value_change(
                lambda event: self._set(over=int(event.value or 1) if (event.value or 1) > 1 else None)
            )
            smooth.classes("w-32").props("debounce=300")
            log = ui.switch("Log axis", value="log" in view)
            log.on_value_change(lambda event: self._set(log="1" if event.value else None))
            self.ends = {}
            for key in ("from", "to"):
                end = ui.number(f"{key.capitalize()} step", value=frame.number(view, key), min=0, step=1)
                end.props("dense clearable debounce=500").classes("w-28")
                end.on_value_change(
                    lambda event, key=key: self._set(**{key: None if event.value is None else int(event.value)})
                )
                self.ends[key] = end
            ui.button("Whole stage", on_click=lambda: self._zoom(None, None)).props("flat dense")
            ui.button("CSV of all", on_click=lambda: self._download_csv("metrics", None)).props("flat dense")

    async def _set(self, **changes: Any) -> None:
        frame.remember(self.view, **changes)
        await self.refresh()

    async def _zoom(self, first: int | None, last: int | None) -> None:
        self.view.pop("from", None), self.view.pop("to", None)
        self.ends["from"].set_value(first)
        self.ends["to"].set_value(last)
        await self._set(**{"from": first, "to": last})

    async def _zoomed(self, event: GenericEventArguments) -> None:
        """A stretch was chosen by dragging over a chart."""
        for part in (event.args or {}).get("batch") or []:
            ends = part.get("startValue"), part.get("endValue")
            if all(isinstance(end, int | float) for end in ends):
                first, last = round(ends[0]), round(ends[1])
                if last > first and (first, last) != (frame.number(self.view, "from"), frame.number(self.view, "to")):
                    await self._zoom(max(first, 0), last)
                return

    async def _show_more(self) -> None:
        self.count += MORE
        await self._set(more=self.count)

    # --- what is drawn --------------------------------------------------------------------------------------

    async def refresh(self) -> None:
        """Draw what is new, or was asked for otherwise."""
        self._make_ready()
        asked = (self.followed.version, dict(self.view))
        if asked == self.drawn:
            return
        self.drawn = asked
        names, ends = await asyncio.to_thread(self._ends)
        marks = charts.marks_of(self.followed.events(), self.stage)
        search = (self.view.get("search") or "").lower()
        wanted = {title: (self.first_grid, found, why) for title, found, why in charts.grouped(names)
                  if not search or any(search in name.lower() for name in found)}  # fmt: skip
        others = [name for name in charts.others(names) if search in name.lower()]
        wanted |= {name: (self.other_grid, [name], "") for name in others[: self.count]}
        self.none.set_text(f"No other metric has '{search}' in its name." if search else "There is none.")
        self.none.set_visibility(not others)
        self.more.set_visibility(len(others) > self.count)
        for title in [title for title in self.cards if title not in wanted]:
            self.cards.pop(title).frame.delete()
        for title, (grid, found, why) in wanted.items():
            card = self.cards.get(title) or self._card(grid, title, why)
            card.names = found
        drawn = await asyncio.to_thread(self._options, ends, marks)
        for title, options in drawn.items():
            if title in self.cards:
                self._draw(self.cards[title], options)
        self._show_marks(marks)

    def _ends(self) -> tuple[list[str], tuple[int, int]]:
        """The metrics, and the steps that are shown."""
        with self.followed.lock:
            columns = self.followed.columns(self.stage)
            names, steps = columns.names, columns.steps
        ends = steps[[0, -1]].tolist() if len(steps) else [0, 0]
        first, last = frame.number(self.view, "from"), frame.number(self.view, "to")
        first = ends[0] if first is None else first
        return names, (first, max(first, ends[1] if last is None else last))

    def _options(self, ends: tuple[int, int], marks: list[charts.Mark]) -> dict[str, charts.Options]:
        over, log = frame.number(self.view, "over") or 1, "log" in self.view
        drawn = {}
        for title, card in list(self.cards.items()):
            lines = []
            for name in card.names:
                curve = self.followed.curve(self.stage, name, WIDTH, *ends)
                smooth = self.followed.curve(self.stage, name, WIDTH, *ends, over=over) if over > 1 else None
                lines.append(Line(name, curve, smooth))
            drawn[title] = charts.chart(title, lines, marks, *ends, log=log)
        return drawn

    def _card(self, grid: ui.element, title: str, why: str) -> _Card:
        with grid, ui.card().classes("w-full gap-1 p-3 min-w-0") as box:
            with ui.row().classes("items-center w-full gap-2 no-wrap"):
                ui.label(title).classes("font-bold truncate grow")
                with ui.row().classes("gap-1 no-wrap") as buttons:
                    csv_button = ui.button("CSV", on_click=lambda: self._download_csv(title, self.cards[title].names))
                    png_button = ui.button("PNG", on_click=lambda: self._download_png(title))
            for button, kind in ((csv_button, "CSV"), (png_button, "PNG")):
                button.props("flat dense size=sm")
                button.props["aria-label"] = f"Download {title} as {kind}"
            nothing = frame.nothing(why[:1].upper() + why[1:] + "." if why else "")
            chart = Plot().classes("w-full h-56")
            chart.on("chart:datazoom", self._zoomed, ["batch"], throttle=0.2)
        self.cards[title] = _Card(title, [], why, box, nothing, buttons, chart)
        return self.cards[title]

    def _draw(self, card: _Card, options: charts.Options) -> None:
        for element in (card.chart, card.buttons):
            element.set_visibility(bool(card.names))
        card.nothing.set_visibility(not card.names)
        card.frame.classes(**{"remove" if card.names else "add": "order-last"})
        if card.names and card.chart.draw(options):
            card.is_drawn = True
            if card.is_ready:  # what the dragging left of itself
                card.chart.run_chart_method("dispatchAction", {"type": "dataZoom", "start": 0, "end": 100})

    def _make_ready(self) -> None:
        """Tell charts that the browser has drawn that dragging zooms, and that they share one tooltip."""
        fresh = [card for card in self.cards.values() if card.names and card.is_drawn and not card.is_ready]
        if not fresh:
            return
        cursor = {"type": "takeGlobalCursor", "key": "dataZoomSelect", "dataZoomSelectActive": True}
        for card in fresh:
            card.is_ready = True
            card.chart.run_chart_method("dispatchAction", cursor)
        ui.run_javascript(_CONNECT % [card.chart.id for card in self.cards.values()])

    def _show_marks(self, marks: list[charts.Mark]) -> None:
        self.no_marks.set_visibility(not marks)
        self.marks.show({
            f"{number}": [f"{mark.step:,}", mark.kind, mark.text, frame.ago(mark.time)]
            for number, mark in reversed(list(enumerate(marks))[-200:])
        })  # fmt: skip

    # --- downloads ------------------------------------------------------------------------------------------

    async def _download_csv(self, title: str, names: list[str] | None) -> None:
        content = await asyncio.to_thread(as_csv, self.followed, self.stage, names)
        ui.download.content(content, f"{self._file_name(title)}.csv", "text/csv")

    async def _download_png(self, title: str) -> None:
        options = {"type": "png", "pixelRatio": 2, "backgroundColor": "#ffffff"}
        url = await self.cards[title].chart.run_chart_method("getDataURL", options, timeout=10)
        ui.download.content(base64.b64decode(url.partition(",")[2]), f"{self._file_name(title)}.png", "image/png")

    def _file_name(self, title: str) -> str:
        text = f"{self.followed.run.name} {self.stage} {title}"
        return "".join(sign if sign.isalnum() or sign in "-_." else "_" for sign in text)


def as_csv(followed: Followed, stage: str, names: list[str] | None) -> str:
    """Metrics of a stage, all of them if none are named, a line a step; what was not told is empty."""
    with followed.lock:
        columns = followed.columns(stage)
        chosen = columns.names if names is None else names
        told = {name: dict(zip(*(part.tolist() for part in columns.column(name)), strict=True)) for name in chosen}
        steps = columns.steps.tolist()
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["step", *chosen])
    for step in steps:
        row = [told[name].get(step, "") for name in chosen]
        if any(value != "" for value in row):
            writer.writerow([step, *row])
    return text.getvalue()


def show(followed: Followed, stage: str | None, view: dict[str, str]) -> None:
    """The curves of a stage."""
    if stage is None:
        frame.nothing("No stage has begun yet, so that there is nothing to draw.")
        return
    frame.refreshed(_StagePage(followed, stage, view).refresh)
