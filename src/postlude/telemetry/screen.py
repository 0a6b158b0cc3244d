"""How wide the lines are that people read, and reports that fit there. The only place that decides the width.

A terminal has its own. Elsewhere (a file, a pipe, a log of CI) a line has 80 columns, whatever the window is in which
the command was typed: the same report always reads the same, and fits wherever it is opened later. ``COLUMNS`` says
otherwise.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import IO, Any, Literal

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.padding import Padding
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from postlude.telemetry.guard import Guarded, shown

WIDTH = 80
"""Columns of a line where the output is no terminal."""

Kind = Literal["text", "whole", "number"]
"""What a column holds: text that may take several lines, text that may not (a name, a drawing), or numbers."""

_NARROW = 24
"""Columns that a column of text needs to be readable, where it would fill more."""


class Screen(Console):
    """A console on which nothing acts but what rich makes itself."""

    def render(self, renderable: Any, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=shown(segment.text))

    @property
    def file(self) -> IO[str]:
        """The terminal itself, where :func:`guard_streams` has put something before it."""
        file = super().file
        return file.beneath if isinstance(file, Guarded) else file

    @file.setter
    def file(self, file: IO[str]) -> None:
        self._file = file


def open_console(stderr: bool = False) -> Console:
    """Standard output or standard error, as wide as what is printed there may be."""
    console = Screen(stderr=stderr, highlight=False)
    if not console.is_terminal and not os.environ.get("COLUMNS", "").isdecimal():
        console.width = WIDTH
    return console


def prose(console: Console, text: str, whole: bool = False, warning: str = "") -> None:
    """Print sentences: broken between words on a terminal, never within a path; elsewhere, or ``whole``, a line remains
    one, so that a log can be searched. ``warning`` stands before them, in red."""
    text = warning + shown(text)
    if console.is_terminal and not whole:
        fill = partial(textwrap.fill, width=console.width, break_long_words=False, break_on_hyphens=False)
        text = "\n".join(fill(line) for line in text.split("\n"))
    styled = Text(text)
    styled.stylize("bold red", 0, len(warning))
    console.print(styled, soft_wrap=True)


class Listing:
    """Rows under heads: a table where the line has room for it, else each row as a few lines, ``head value, head
    value`` under its first cell. Nothing is ever cut, and no number or head broken."""

    def __init__(self, title: str, heads: Mapping[str, Kind]) -> None:
        self.title, self.heads = shown(title), dict(heads)
        self._rows: list[tuple[list[Text], str | None]] = []

    def add_row(self, *cells: str | Text, style: str | None = None) -> None:
        """Add a cell for each head."""
        self._rows.append(([cell if isinstance(cell, Text) else Text(shown(cell)) for cell in cells], style))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.title:
            yield Text(self.title, "bold")
        widths = [max(map(_width, (head, *cells))) if any(cells) else 0 for head, cells in self._columns()]
        columns = [(kind, width) for kind, width in zip(self.heads.values(), widths, strict=True) if width]
        least = sum(min(width, _NARROW) if kind == "text" else width for kind, width in columns)
        fits = least + 2 * (len(columns) - 1) <= options.max_width
        yield from [self._table(widths)] if fits else self._lines(options.max_width)

    def _columns(self) -> Iterator[tuple[str, list[str]]]:
        for place, head in enumerate(self.heads):
            yield head, [cells[place].plain for cells, _ in self._rows]

    def _table(self, widths: list[int]) -> Table:
        """Without the columns that hold nothing, whose width is 0."""
        table = _plain_table(show_header=any(self.heads))
        for (head, kind), width in zip(self.heads.items(), widths, strict=True):
            if width:
                justify: Literal["left", "right"] = "right" if kind == "number" else "left"
                table.add_column(Text(head), justify=justify, overflow="fold", no_wrap=kind != "text")
        for cells, style in self._rows:
            table.add_row(*(cell for cell, width in zip(cells, widths, strict=True) if width), style=style)
        return table

    def _lines(self, width: int) -> Iterator[Text | Padding]:
        for (first, *rest), style in self._rows:
            first.overflow = "fold"
            yield Text.assemble(first, style=style or "")
            heads = [*self.heads][1:]
            parts = [
                f"{head} {' '.join(cell.plain.split())}" for head, cell in zip(heads, rest, strict=True) if cell.plain
            ]
            yield Padding(Text("\n".join(_filled(parts, width - 4)), style or "", overflow="fold"), (0, 0, 0, 4))


@dataclass
class Fields:
    """Names with a value each."""

    title: str
    rows: list[tuple[str, str]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.title:
            yield Text(self.title, "bold")
        table = _plain_table(show_header=False)
        table.add_column(overflow="fold", max_width=options.max_width // 2)
        table.add_column(overflow="fold")
        for name, value in self.rows:
            table.add_row(Text(shown(name)), Text(shown(value)))
        yield table


def _width(text: str) -> int:
    """Columns that the text fills, of its lines the longest."""
    return max(map(cell_len, text.split("\n")))


def _plain_table(show_header: bool) -> Table:
    """A table that spends its width on what it holds."""
    return Table(
        box=SIMPLE_HEAD if show_header else None,
        show_header=show_header,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0) if show_header else (0, 2, 0, 0),
    )


def _filled(parts: Iterable[str], width: int) -> Iterator[str]:
    """The parts with commas between them, in lines that end after a part."""
    line = ""
    for part in parts:
        if line and cell_len(line) + 2 + cell_len(part) > width:
            yield line + ","
            line = part
        else:
            line = f"{line}, {part}" if line else part
    yield line
