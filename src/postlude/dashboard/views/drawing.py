"""A chart under its title, which is drawn anew where its options have changed, and hidden where there is nothing."""

from __future__ import annotations

from nicegui import ui

from postlude.dashboard.charts import Options


class Chart:
    """A chart that is not there before something is drawn."""

    def __init__(self, title: str) -> None:
        with ui.card().classes("w-full gap-1 p-3 min-w-0") as self._card:
            self._title = ui.label(title).classes("font-bold break-words")
            self._chart = ui.echart({"series": []}).classes("w-full h-56")
        self._card.set_visibility(False)
        self._options: Options | None = None

    def draw(self, options: Options | None, height: int = 224, title: str | None = None) -> None:
        """Draw this, so many pixels high; None for nothing."""
        self._card.set_visibility(options is not None)
        if title is not None:
            self._title.set_text(title)
        if options is None or options == self._options:
            return
        self._options = options
        self._chart.style(f"height: {height}px")
        self._chart.options.clear()
        self._chart.options.update(options)
        self._chart.update()
