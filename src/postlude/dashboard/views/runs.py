"""All runs of a folder, and one run at a glance."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from nicegui import ui

from postlude.dashboard import charts, frame
from postlude.dashboard.followed import Followed, Following, seconds_left
from postlude.dashboard.views.tables import Cell, Choice, Link, Table
from postlude.runs import Ancestor
from postlude.storage import StorageError
from postlude.telemetry.alarms import Standing
from postlude.telemetry.progress import duration
from postlude.workflow.drawing import draw
from postlude.workflow.overview import Brief
from postlude.workflow.status import StageStatus

PAGE_RUNS = 20


class _List:
    """The runs of a folder, so many a page."""

    def __init__(self, following: Following, view: dict[str, str]) -> None:
        self.following, self.view = following, view
        self.page = frame.number(view, "page") or 0
        self.chosen = [name for name in view.get("with", "").split("/") if name]
        with ui.row().classes("items-center gap-4 w-full"):
            search = ui.input("Search runs", value=view.get("search", "")).props("dense clearable debounce=300")
            search.on_value_change(lambda event: self._search(event.value or ""))
            self.compare = ui.link("Compare", "/")
        self.told = frame.nothing("Reading ...")
        self.table = Table(
            ["", "run", "state", "stages", "stage", "step", "done", "loss", "checkpoint", "alarms", "changed"]
        )
        with ui.row().classes("items-center gap-4"):
            self.before = ui.button("Before", on_click=lambda: self._turn(-1)).props("flat dense")
            self.where = ui.label()
            self.after = ui.button("After", on_click=lambda: self._turn(1)).props("flat dense")
        self._link_compare()

    async def refresh(self) -> None:
        try:
            count, briefs = await asyncio.to_thread(self._read)
        except StorageError as error:
            self.told.set_text(str(error))
            self.table.show({})
            return
        if not briefs:
            search = self.view.get("search")
            empty = (
                f"No run has '{search}' in its name."
                if search
                else f"There is no run in {self.following.overview.folder}."
            )
            self.told.set_text(f"{empty} `postlude run MANIFEST` makes one below the manifest's run_dir."
                               if not search else empty)  # fmt: skip
        self.told.set_visibility(not briefs)
        self.table.show({brief.run.name: self._row(brief) for brief in briefs})
        first = self.page * PAGE_RUNS
        self.where.set_text(f"{first + 1:,} to {min(first + PAGE_RUNS, count):,} of {count:,}" if count else "")
        for button, is_there in ((self.before, self.page > 0), (self.after, first + PAGE_RUNS < count)):
            button.set_visibility(is_there)

    def _read(self) -> tuple[int, list[Brief]]:
        names = self.following.overview.names(self.view.get("search", ""))
        self.page = min(self.page, max(len(names) - 1, 0) // PAGE_RUNS)
        shown = names[self.page * PAGE_RUNS : (self.page + 1) * PAGE_RUNS]
        return len(names), [brief for name in shown if (brief := self.following.overview.brief(name))]

    def _row(self, brief: Brief) -> list[Cell]:
        name = brief.run.name
        done = sum(state == "done" for state in brief.states.values())
        return [
            Choice(f"Compare {name}", name in self.chosen, lambda chosen: self._choose(name, chosen)),
            Link(name, frame.address({}, run=name, theme=self.view.get("theme"))),
            brief.state if not brief.trouble else f"{brief.state}: {brief.trouble}",
            f"{done} of {len(brief.states)}" if brief.states else "",
            brief.stage or "",
            "" if brief.step is None else f"{brief.step:,}",
            "" if brief.progress is None else f"{brief.progress:.0%}",
            "" if brief.loss is None else f"{brief.loss:z.4f}",
            "" if brief.checkpoint is None else f"step {brief.checkpoint:,}",
            f"{brief.alarms}" if brief.alarms else "",
            frame.ago(brief.changed_at),
        ]

    async def _search(self, text: str) -> None:
        self.page = 0
        frame.remember(self.view, search=text, page=None)
        await self.refresh()

    async def _turn(self, by: int) -> None:
        self.page = max(self.page + by, 0)
        frame.remember(self.view, page=self.page or None)
        await self.refresh()

    def _choose(self, name: str, is_chosen: bool) -> None:
        self.chosen = [other for other in self.chosen if other != name] + [name] * is_chosen
        frame.remember(self.view, **{"with": "/".join(self.chosen)})
        self._link_compare()

    def _link_compare(self) -> None:
        self.compare.set_text(f"Compare {len(self.chosen)} runs")
        self.compare.props["href"] = frame.address({}, compare="/".join(self.chosen), theme=self.view.get("theme"))
        self.compare.set_visibility(len(self.chosen) > 1)


def show_list(following: Following, view: dict[str, str]) -> None:
    """All runs of the folder."""
    frame.refreshed(_List(following, view).refresh)


# --- one run ------------------------------------------------------------------------------------------------


def show(followed: Followed, stage: str | None, view: dict[str, str]) -> None:
    """One run: its stages, what they come from, and its alarms."""
    head = ui.label().classes("whitespace-pre-wrap break-words")
    graph = ui.echart({"series": []}).classes("w-full")
    table = Table(["stage", "state", "step", "done", "time left", "loss", "checkpoint", "tokens/s", "needs"])
    ui.label("Alarms").classes("font-bold")
    none = frame.nothing("No alarm stands: no rule has begun one that lasts or that nobody has acknowledged.")
    alarms = Table(["since", "stage", "step", "alarm", "what it says", ""])
    ui.label("Where they come from").classes("font-bold")
    lineage = ui.column().classes("w-full gap-0 text-sm")
    shown = [-1]

    async def refresh() -> None:
        if followed.version == shown[0] or (status := followed.status) is None:
            return
        shown[0] = followed.version
        work = await asyncio.to_thread(_work, followed, status.stages)
        damage = f"\n{status.damage}" if status.damage else ""
        holder = f", held by {status.holder}" if status.holder else ", nobody works on it"
        head.set_text(f"{followed.run.uri}\n{status.state}{holder}{damage}")
        stages = {each.summary.stage: each for each in status.stages}
        needs = {name: (each.summary.state, each.needs) for name, each in stages.items()}
        options = charts.graph(needs)
        if options != graph.options:
            graph.options.clear()
            graph.options.update(options)
            graph.style(f"height: {20 + 70 * charts.rows_of(needs)}px")
            graph.update()
        drawn = draw({name: each.needs for name, each in stages.items()})
        table.show({name: _stage_row(stages[name], branch, *work[name], view) for name, branch, _ in drawn})
        none.set_visibility(not status.standing)
        alarms.show({f"{each.alarm.time} {each.alarm.what}": _alarm_row(each) for each in reversed(status.standing)})
        lineage.clear()
        with lineage:
            made = [each for each in status.stages if each.lineage]
            inner = {need for each in made for need in each.needs}
            ends = [each.lineage for each in made if each.summary.stage not in inner]
            texts = [text for lineage in ends if lineage for text in _ancestors(lineage, 0)]
            for text in texts:
                ui.label(text).classes("whitespace-pre-wrap break-all font-mono text-xs")
            if not texts:
                frame.nothing("No stage has made anything yet; what it makes says what it was made of.")

    frame.refreshed(refresh)


def _work(followed: Followed, stages: list[StageStatus]) -> dict[str, tuple[float | None, float | None]]:
    """Of each stage the share that is done, and the seconds that it still takes."""
    known: dict[str, tuple[float | None, float | None]] = {}
    with followed.lock:
        for summary in (each.summary for each in stages):
            shares = followed.columns(summary.stage).column("progress")[1]
            is_running = summary.state == "running"
            left = seconds_left(followed.columns(summary.stage)) if is_running else None
            known[summary.stage] = float(shares[-1]) if len(shares) else None, left
    return known


def _stage_row(
    each: StageStatus, branch: str, done: float | None, left: float | None, view: dict[str, str]
) -> list[Cell]:
    summary = each.summary
    state = [summary.state] + [f"revision {each.revision}"] * (each.revision > 1)
    state += [f"from {each.taken_over_from}"] * (each.taken_over_from is not None)
    text = ", ".join(state) + "".join(f"\n{line}" for line in [*each.damages, *([each.error] if each.error else [])])
    return [
        Link(branch.replace("  ", " "), frame.address(view, view="stage", stage=summary.stage)),
        text,
        f"{summary.steps:,}" if summary.steps else "",
        "" if done is None else f"{done:.0%}",
        "" if left is None else duration(left),
        "" if summary.last_loss is None else f"{summary.last_loss:z.4f}",
        "" if each.checkpoint is None else f"step {each.checkpoint:,}",
        f"{summary.tokens_per_second:,.0f}" if summary.tokens_per_second else "",
        ", ".join(each.needs),
    ]


def _alarm_row(each: Standing) -> list[Cell]:
    alarm, over = each.alarm, each.over
    state = ["acknowledged"] * each.acknowledged
    state += [f"over since step {over.step:,}" if over.step is not None else "over"] if over else []
    step = "" if alarm.step is None else f"{alarm.step:,}"
    return [frame.ago(alarm.time), alarm.stage or "", step, alarm.what, alarm.reason, ", ".join(state)]


def _ancestors(ancestor: Ancestor, depth: int) -> Iterator[str]:
    """An artifact and what it comes from, a line each."""
    gone = "" if ancestor.place else ", gone"
    yield (f"{'    ' * depth}{ancestor.run}/{ancestor.stage}, revision {ancestor.revision}, "
           f"sha256 {ancestor.artifact_sha256[:16]}{gone}")  # fmt: skip
    for what, files in ancestor.files.items():
        yield f"{'    ' * (depth + 1)}{what}: {len(files)} files, {next(iter(files), 'none')}"
    for parent in ancestor.parents:
        yield from _ancestors(parent, depth + 1)
