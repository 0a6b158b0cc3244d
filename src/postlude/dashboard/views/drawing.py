"""A chart under its title, which is drawn anew where its options have changed, and hidden where there is nothing."""

from __future__ import annotations

import orjson
from nicegui import ui

from postlude.dashboard.charts import Options


class Plot(ui.echart):
    """What a chart is drawn by.

    NiceGUI would wrap every list in an object that tells of its changes, of each point of a curve one: several times
    the memory and the time of the text that is sent. So it is given the text.
    """

    def __init__(self) -> None:
        super().__init__({"series": []})
        self._drawn = b""

    def draw(self, options: Options) -> bool:
        """Draw this. Whether it is something new."""
        content = orjson.dumps(options)
        if content == self._drawn:
            return False
        self._drawn = content
        self.props["options"] = orjson.Fragment(content)
        return True


class Chart:
    """A chart that is not there before something is drawn."""

    def __init__(self, title: str) -> None:
        with ui.card().classes("w-full gap-1 p-3 min-w-0") as self._card:
            self._title = ui.label(title).classes("font-bold break-words")
            self._chart = Plot().classes("w-full h-56")
        self._card.set_visibility(False)

    def draw(self, options: Options | None, height: int = 224, title: str | None = None) -> None:
        """Draw this, so many pixels high; None for nothing."""
        self._card.set_visibility(options is not None)
        if title is not None:
            self._title.set_text(title)
        if options is not None and self._chart.draw(options):
            self._chart.style(f"height: {height}px")
