"""Runs side by side: their states, what their manifests do not share, and the same metric of each."""

from __future__ import annotations

import asyncio

from nicegui import ui

from postlude.dashboard import charts, frame
from postlude.dashboard.charts import Line
from postlude.dashboard.followed import Followed, Following
from postlude.dashboard.views.drawing import Plot
from postlude.dashboard.views.tables import Table
from postlude.errors import UserError

MOST = 8
"""Runs side by side."""
WIDTH = 600


async def show(following: Following, view: dict[str, str]) -> None:
    """The runs that the address names under ``compare``, with slashes between them."""
    names = [name for name in dict.fromkeys(view["compare"].split("/")) if name][:MOST]
    runs = {name: followed for name in names if (followed := following.find(name))}
    for name in (name for name in names if name not in runs):
        frame.warn(f"There is no run '{name}' in {following.overview.folder}: it was removed or moved.")
    if len(runs) < 2:
        frame.nothing("To compare takes two runs: choose them in the list.")
        return
    for each in runs.values():
        if each.status is None:
            await asyncio.to_thread(each.update)
        for text in each.troubles.values():
            frame.warn(text)
    table = Table(["run", "state", "stages", "step", "loss"])
    stages = list(dict.fromkeys(stage for each in runs.values() for stage in each.stages()))
    stage = view.get("stage") if view.get("stage") in stages else _common(runs)
    with ui.row().classes("items-center gap-4"):
        for name in stages:
            link = ui.link(name, frame.address(view, stage=name))
            if name == stage:
                link.classes("font-bold").props("aria-current=true")
    metrics = ui.select([view.get("metric", "loss")], value=view.get("metric", "loss"), label="Metric", with_input=True)
    metrics.classes("w-64").props("dense")
    none = frame.nothing("None of the runs has told this metric in this stage.")
    chart = Plot().classes("w-full h-72")
    await _show_differences(following, runs)
    shown: list[object] = []

    async def refresh() -> None:
        for each in runs.values():
            each.touch()
        asked = [[each.version for each in runs.values()], view.get("metric")]
        if asked == shown:
            return
        shown[:] = asked
        table.show({name: _row(name, each) for name, each in runs.items()})
        known, options = await asyncio.to_thread(_options, runs, stage or "", view.get("metric", "loss"))
        if known and known != metrics.options:
            metrics.set_options(known, value=metrics.value if metrics.value in known else None)
        none.set_visibility(options is None)
        chart.set_visibility(options is not None)
        if options is not None:
            chart.draw(options)

    async def choose(metric: str | None) -> None:
        frame.remember(view, metric=metric)
        await refresh()

    metrics.on_value_change(lambda event: choose(event.value))
    frame.refreshed(refresh)


async def _show_differences(following: Following, runs: dict[str, Followed]) -> None:
    """What the manifest of each run does not share with that of the first."""
    ui.label("What their manifests do not share").classes("font-bold")
    first, *others = runs
    for other in others:
        ui.label(f"{first} -> {other}").classes("text-sm")
        try:
            lines = await asyncio.to_thread(following.overview.differences, runs[first].run, runs[other].run)
        except (UserError, OSError) as error:
            frame.warn(str(error))
            continue
        for line in lines:
            ui.label(line).classes("font-mono text-xs break-all whitespace-pre-wrap")
        if not lines:
            frame.nothing("Their manifests are the same.")


def _common(runs: dict[str, Followed]) -> str | None:
    """The last stage that every run has begun, else one that any has."""
    current = [each.current_stage() for each in runs.values()]
    shared = [name for name in current if all(name in each.stages() for each in runs.values())]
    return (shared or [name for name in current if name] or [None])[0]


def _row(name: str, each: Followed) -> list[str]:
    if each.status is None:
        return [name, "not known", "", "", ""]
    summaries = [stage.summary for stage in each.status.stages]
    done = sum(summary.state == "done" for summary in summaries)
    losses = [summary.last_loss for summary in summaries if summary.last_loss is not None]
    steps = sum(summary.steps for summary in summaries)
    loss = f"{losses[-1]:z.4f}" if losses else ""
    return [name, each.status.state, f"{done} of {len(summaries)}", f"{steps:,}", loss]


def _options(runs: dict[str, Followed], stage: str, metric: str) -> tuple[list[str], charts.Options | None]:
    """The metrics that any run has, and the curves of one."""
    known: dict[str, None] = {}
    ends = []
    for each in runs.values():
        if stage in each.stages():
            with each.lock:
                columns = each.columns(stage)
                known |= dict.fromkeys(columns.names)
                if len(columns.steps) and metric in columns.names:
                    ends.append((int(columns.steps[0]), int(columns.steps[-1])))
    if not ends:
        return list(known), None
    first, last = min(begin for begin, _ in ends), max(end for _, end in ends)
    lines = [
        Line(name, each.curve(stage, metric, WIDTH, first, last))
        for name, each in runs.items()
        if stage in each.stages()
    ]
    return list(known), charts.chart(metric, lines, [], first, last)
