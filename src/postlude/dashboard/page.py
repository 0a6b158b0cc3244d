"""The page: a head with its navigation, and below it the view that its address names."""

from __future__ import annotations

import asyncio

from nicegui import ui

from postlude.dashboard import frame
from postlude.dashboard.followed import Followed, Following
from postlude.dashboard.views import OF_STAGE, VIEWS, compare, runs, tables

CONNECT_SECONDS = 30.0
"""A browser that asked for a page has so long to open its socket; before, nothing of a run is read for it."""
_THEMES = {"light": False, "dark": True}


async def build(following: Following) -> None:
    """Build what the address asks for. Of runs nothing is read before the browser is there."""
    view = dict(ui.context.client.request.query_params)
    if following.overview.is_run:
        view.setdefault("run", following.overview.names()[0])
    name = view.get("run")
    ui.dark_mode(_THEMES.get(view.get("theme", "")))
    ui.colors(primary="#3573a8")
    ui.add_css(tables.STYLE)
    ui.page_title(f"{name} - Postlude" if name else "Postlude")
    _head(following, view)
    with ui.column().classes("w-full max-w-screen-2xl mx-auto px-2 sm:px-4 gap-4 items-stretch"):
        await ui.context.client.connected(CONNECT_SECONDS)
        frame.start_refreshing()
        if view.get("compare"):
            await compare.show(following, view)
        elif name is None:
            runs.show_list(following, view)
        elif (followed := following.find(name)) is None:
            frame.warn(
                f"There is no run '{name}' in {following.overview.folder}: it was removed or moved, or never was."
            )
            ui.link("All runs", frame.address({}))
        else:
            await _show(followed, view)


def _head(following: Following, view: dict[str, str]) -> None:
    kept = {key: view[key] for key in ("theme",) if key in view}
    with ui.header().classes("items-center flex-wrap gap-x-4 gap-y-1 px-3 py-2"):
        if not following.overview.is_run:
            _link("Runs", frame.address(kept), "run" not in view)
        if name := view.get("run"):
            ui.label(name).classes("font-bold truncate max-w-xs")
            kept |= {"run": name} | ({"stage": view["stage"]} if "stage" in view else {})
            for key, (title, _) in VIEWS.items():
                _link(title, frame.address(kept, view=key), view.get("view", "overview") == key)
        ui.space()
        if not frame.may_amend():
            ui.label("only looking").classes("text-xs opacity-80")
        theme = "light" if view.get("theme") == "dark" else "dark"
        _link(theme.capitalize(), frame.address(view, theme=theme), False)


def _link(text: str, target: str, is_here: bool) -> None:
    link = ui.link(text, target).classes("text-white no-underline hover:underline focus:underline")
    if is_here:
        link.classes("font-bold underline").props("aria-current=page")


async def _show(followed: Followed, view: dict[str, str]) -> None:
    if followed.status is None:
        waiting = frame.nothing(f"Reading {followed.run.uri} ...")
        await asyncio.to_thread(followed.update)
        if waiting.is_deleted:  # the tab was closed meanwhile
            return
        waiting.delete()
    _troubles(followed)
    if followed.status is None:
        return
    chosen = view.get("view", "overview")
    _, show = VIEWS.get(chosen, VIEWS["overview"])
    stage = view.get("stage")
    if stage not in followed.stages():
        stage = followed.current_stage()
    if chosen in OF_STAGE:
        _choose_stage(followed, stage, view)
    show(followed, stage, view)


def _choose_stage(followed: Followed, stage: str | None, view: dict[str, str]) -> None:
    with ui.row().classes("gap-x-4 gap-y-1").props("role=navigation aria-label=Stages"):
        for name in followed.stages():
            link = ui.link(name, frame.address(view, stage=name, **{"from": None, "to": None}))
            if name == stage:
                link.classes("font-bold").props("aria-current=page")


def _troubles(followed: Followed) -> None:
    """What cannot be read, and why; it comes and goes."""
    place = ui.column().classes("w-full")
    shown: list[str] = []

    def refresh() -> None:
        followed.touch()
        told = list(followed.troubles.values())
        if told != shown:
            shown[:] = told
            place.clear()
            with place:
                for text in told:
                    frame.warn(text)

    refresh()
    frame.refreshed(refresh)
