"""What every view stands in: one timer, the address that holds the state of the view, and words where nothing is.

A view never makes a timer of its own, and reads nothing when its page is built: it registers a refresh, which the page
calls once it is shown and then every second.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlencode

from nicegui import ui

from postlude.dashboard.access import MAY_AMEND

REFRESH_SECONDS = 1.0

Refresh = Callable[[], Awaitable[None] | None]

_KEY = "postlude_refreshes"


def start_refreshing() -> None:
    """Start the page's one timer: call it once, before the views. It does not run before a browser is there."""
    refreshes: list[Refresh] = []
    setattr(ui.context.client, _KEY, refreshes)

    async def tick() -> None:
        for refresh in list(refreshes):
            if inspect.isawaitable(done := refresh()):
                await done

    ui.timer(REFRESH_SECONDS, tick)


def refreshed(refresh: Refresh) -> None:
    """Have something called once the page is shown, and then every second as long as it is open. What takes long or
    takes the lock of a followed run is a coroutine that does it in a thread: ``await asyncio.to_thread(...)``."""
    getattr(ui.context.client, _KEY).append(refresh)


def may_amend() -> bool:
    """Whether who looks at the page may change runs by it."""
    request = ui.context.client.request
    return bool(request is not None and request.scope.get(MAY_AMEND))


def address(view: Mapping[str, Any], /, **changes: Any) -> str:
    """Where a view stands in this state; None takes a key out."""
    state = {key: value for key, value in {**view, **changes}.items() if value not in (None, "")}
    return f"/?{urlencode(state)}" if state else "/"


def remember(view: dict[str, str], /, **changes: Any) -> None:
    """Note the state of a view in the address, so that it is there after the laptop slept, and in a link."""
    for key, value in changes.items():
        if value in (None, ""):
            view.pop(key, None)
        else:
            view[key] = str(value)
    ui.navigate.history.replace(address(view))


def number(view: Mapping[str, str], key: str) -> int | None:
    """A whole number of the address; None where there is none."""
    text = view.get(key, "")
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 16 else None


def nothing(text: str) -> ui.label:
    """Say why there is nothing to show."""
    return ui.label(text).classes("text-sm italic opacity-80")


def warn(text: str) -> ui.label:
    """Say what is wrong."""
    return (
        ui.label(text)
        .classes("w-full p-3 rounded border border-red-600 whitespace-pre-wrap break-words")
        .props("role=alert")
    )


def ago(time: str | None) -> str:
    """How long ago a moment was, in words; empty where it is not known."""
    if not time:
        return ""
    try:
        seconds = (datetime.now(UTC) - datetime.fromisoformat(time)).total_seconds()
    except (ValueError, TypeError):
        return time
    from postlude.telemetry.progress import duration

    return f"{duration(max(seconds, 0))} ago"


def clock(time: str) -> str:
    """A moment as people write it, UTC."""
    return time[:19].replace("T", " ")


def since(begin: str, time: str) -> str:
    """How long after the begin a moment was."""
    from postlude.telemetry.progress import duration

    try:
        return duration((datetime.fromisoformat(time) - datetime.fromisoformat(begin)).total_seconds())
    except (ValueError, TypeError):
        return ""
