"""What a rank would show on a terminal, kept until the process that has the terminal comes for it."""

from __future__ import annotations

import io
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from postlude.telemetry.events import Event
from postlude.telemetry.progress import StageProgress, console


@dataclass
class Relayed:
    """What came since the last time: the newest line of metrics, events in order, and printed text."""

    line: Mapping[str, Any] | None = None
    prepared: tuple[str, float] | None = None
    events: list[Event] = field(default_factory=list)
    text: str = ""

    def show(self, display: StageProgress) -> None:
        """Show it where there is a terminal."""
        for event in self.events:
            display.event(event)
        if self.text:
            console().out(self.text, end="", highlight=False)
        if self.prepared:
            display.preparing(*self.prepared)
        if self.line:
            display.update(self.line)


class Relay(io.TextIOBase):
    """Stands where a :class:`StageProgress` stands that has a terminal, and takes the text that is printed there. Any
    thread may tell it something."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._pending = Relayed()

    def take_console(self, width: int) -> None:
        """From now on keep what this process prints on the console, for one with so many columns."""
        console().file = self  # type: ignore[assignment]
        console().width = width

    def update(self, line: Mapping[str, Any]) -> None:
        """A line of metrics."""
        with self._turn:
            self._pending.line = line

    def preparing(self, what: str, share: float) -> None:
        """How much is done of something that comes before the first step."""
        with self._turn:
            self._pending.prepared = what, share

    def event(self, event: Event) -> None:
        """Something that happened."""
        with self._turn:
            self._pending.events.append(event)

    def write(self, text: str) -> int:
        """Text that was printed."""
        with self._turn:
            self._pending.text += text
        return len(text)

    def take(self) -> Relayed:
        """What came since the last call."""
        with self._turn:
            taken, self._pending = self._pending, Relayed()
        return taken
