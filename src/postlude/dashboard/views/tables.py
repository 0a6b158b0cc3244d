"""Tables that are kept up with: texts change in place, so that whoever reads or has the focus there keeps it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from nicegui import ui


@dataclass(frozen=True)
class Link:
    """A text that leads to an address."""

    text: str
    address: str


@dataclass(frozen=True)
class Choice:
    """A box to be checked, with what is said of it by a reader of the screen."""

    label: str
    is_chosen: bool
    choose: Callable[[bool], None] = field(compare=False)


Cell = str | Link | Choice


STYLE = """
@media (max-width: 639px) {
  .postlude-table thead { display: none; }
  .postlude-table tr { display: block; padding: 0.5rem 0; }
  .postlude-table td { display: flex; gap: 0.75rem; padding: 0.05rem 0; }
  .postlude-table td::before { content: attr(data-head); flex: 0 0 6rem; opacity: 0.7; }
  .postlude-table td > * { min-width: 0; overflow-wrap: anywhere; }
  .postlude-table td:has(> div:empty) { display: none; }
}
"""
"""In a phone's width each row is a few lines, head and value."""


class Table:
    """Rows under heads."""

    def __init__(self, heads: Sequence[str]) -> None:
        self._heads = heads
        self._frame = ui.element("div").classes("w-full overflow-x-auto")
        with self._frame, ui.element("table").classes("w-full text-sm postlude-table"):
            with ui.element("thead"), ui.element("tr"):
                for head in heads:
                    with ui.element("th").classes("text-left font-normal opacity-70 px-2 py-1 whitespace-nowrap"):
                        ui.label(head)
            self._body = ui.element("tbody")
        self._cells: dict[str, list[tuple[Cell, ui.label | ui.link | ui.checkbox]]] = {}

    def show(self, rows: Mapping[str, Sequence[Cell]]) -> None:
        """Show these rows, known by their keys; the heads too only if there is one."""
        self._frame.set_visibility(bool(rows))
        if list(rows) != list(self._cells):
            self._body.clear()
            with self._body:
                self._cells = {key: self._row(cells) for key, cells in rows.items()}
            return
        for key, cells in rows.items():
            for place, cell in enumerate(cells):
                before, element = self._cells[key][place]
                if cell == before:
                    continue
                self._cells[key][place] = cell, element
                if isinstance(cell, Choice) and isinstance(element, ui.checkbox):
                    element.set_value(cell.is_chosen)
                elif isinstance(cell, Link) and isinstance(element, ui.link):
                    element.set_text(cell.text)
                    element.props["href"] = cell.address
                elif isinstance(cell, str) and isinstance(element, ui.label):
                    element.set_text(cell)

    def _row(self, cells: Sequence[Cell]) -> list[tuple[Cell, ui.label | ui.link | ui.checkbox]]:
        with ui.element("tr").classes("border-t border-gray-400/30 align-top"):
            return [(cell, self._element(cell, head)) for cell, head in zip(cells, self._heads, strict=True)]

    def _element(self, cell: Cell, head: str) -> ui.label | ui.link | ui.checkbox:
        place = ui.element("td").classes("px-2 py-1")
        place.props["data-head"] = head
        with place:
            if isinstance(cell, Link):
                return ui.link(cell.text, cell.address)
            if isinstance(cell, Choice):
                box = ui.checkbox(value=cell.is_chosen, on_change=lambda event: cell.choose(bool(event.value)))
                box.props["aria-label"] = cell.label
                return box.props("dense")
            return ui.label(cell).classes("whitespace-pre-wrap break-words max-w-md")
