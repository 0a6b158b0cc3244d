"""What a person sees while a run runs: one live line for a stage, a word for every wait that is not short, and
a table at the end.

All of it goes to standard error. Where that is not a terminal, plain lines come at intervals.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol

from rich.cells import cell_len
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from postlude.runs import Run
from postlude.telemetry import events
from postlude.telemetry.guard import shown
from postlude.telemetry.screen import Kind, Listing, open_console, prose
from postlude.telemetry.summary import summarize

PLAIN_SECONDS = 10.0
"""Between two plain lines of one stage."""

WAIT_SECONDS = 5.0
"""A wait of this length is told, and then told again each time it has become twice as long."""


@cache
def console() -> Console:
    """The terminal, on standard error. What is printed elsewhere tears a live line."""
    return open_console(stderr=True)


def say(text: str, whole: bool = False) -> None:
    """Print sentences on standard error, above a live line if one stands; ``whole`` leaves it to the terminal to break
    them, so that a command in them can be copied."""
    prose(console(), text, whole)


class Display(Protocol):
    """What shows how a stage comes along."""

    def update(self, line: Mapping[str, Any]) -> None:
        """Show a line of metrics: ``step``, ``loss``, ``tokens_per_second``, and ``progress``, the share done."""

    def preparing(self, what: str, share: float) -> None:
        """Show how much is done, 0 to 1, of something that comes before the first step."""

    def event(self, event: events.Event) -> None:
        """Show an event that a person should know of at once."""


class StageProgress:
    """Shows how a stage comes along on this process's terminal: one live line, or plain ones. A context manager."""

    def __init__(self, stage: str, live: bool = True) -> None:
        self._stage, self._may_be_live = stage, live
        self._line: Mapping[str, Any] = {}
        self._marks: deque[tuple[float, float]] = deque(maxlen=64)
        """Recent moments in seconds, with the share of the work that was done by then."""
        self._prepared: tuple[str, float] | None = None
        """What is told before the first line, and the share of it that is done."""
        self._live: Live | None = None
        self._printed: Mapping[str, Any] | None = None
        self._printed_at = -PLAIN_SECONDS
        self._begin = time.monotonic()

    def __enter__(self) -> StageProgress:
        if self._may_be_live and console().is_terminal:
            self._live = Live(console=console(), get_renderable=self._render, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()
        if self._line and self._line is not self._printed:
            say(self._describe())

    def update(self, line: Mapping[str, Any]) -> None:
        """Show a line of metrics: ``step``, ``loss``, ``tokens_per_second``, and ``progress``, the share done."""
        now = time.monotonic()
        self._line = line
        self._marks.append((now, line.get("progress", 0.0)))
        if self._live is None and now - self._printed_at >= PLAIN_SECONDS:
            self._printed_at, self._printed = now, line
            say(self._describe())

    def preparing(self, what: str, share: float) -> None:
        """Show how much is done, 0 to 1, of something that comes before the first step."""
        now = time.monotonic()
        self._prepared = f"{self._stage}: {what}, {share:.0%}", share
        if self._live is None and now - self._printed_at >= PLAIN_SECONDS:
            self._printed_at = now
            say(self._prepared[0])

    def event(self, event: events.Event) -> None:
        """Show an event that a person should know of at once."""
        shown = _worth_telling(event)
        if shown:
            say(f"{self._stage}: {shown}")

    def seconds_left(self) -> float | None:
        """How long the rest will take at the rate of the recent steps; None while that cannot be told."""
        if len(self._marks) < 2:
            return None
        (begin, done_then), (now, done) = self._marks[0], self._marks[-1]
        return (1.0 - done) * (now - begin) / (done - done_then) if done > done_then else None

    def _describe(self) -> str:
        line, left = self._line, self.seconds_left()
        parts = [f"{self._stage}: step {line['step']}"]
        if "progress" in line:
            parts.append(f"{line['progress']:.0%}")
        if line.get("loss") is not None:
            parts.append(f"loss {line['loss']:z.4f}")
        if line.get("tokens_per_second") is not None:
            parts.append(f"{line['tokens_per_second']:,.0f} tokens/s")
        if left is not None and line["progress"] < 1:
            parts.append(f"{duration(left)} left")
        elif line.get("progress") == 1:
            parts.append(duration(time.monotonic() - self._begin))
        return ", ".join(parts)

    def _render(self) -> Table | Text:
        if not self._line and self._prepared is None:
            return Text(f"{self._stage}: starting, {duration(time.monotonic() - self._begin)}")
        text, share = self._prepared or ("", 0.0)
        if self._line:
            text, share = self._describe(), self._line.get("progress", 0.0)
        room = console().width - cell_len(text) - 1
        grid = Table.grid(padding=(0, 1))
        grid.add_row(
            ProgressBar(total=1.0, completed=share, width=max(4, min(room, 20))), Text(shown(text), overflow="fold")
        )
        return grid


def _worth_telling(event: events.Event) -> str | None:
    match event:
        case events.Evaluation():
            numbers = event.metrics if event.loss is None else {"loss": event.loss}
            return f"step {event.step}, {', '.join(f'{k} {v:z.4f}' for k, v in numbers.items())} on {event.name}"
        case events.Alarm():
            return f"ALARM: {event.what}: {event.reason}"
        case events.AlarmOver():
            return f"over: {event.what}: {event.reason}"
        case events.NotificationsDropped():
            return f"{event.receiver} was not told of {event.count} alarms: {event.reason}"
        case events.CheckpointSkipped():
            return f"the checkpoint of step {event.step} cannot be used and is passed over: {event.reason}"
        case events.StepSkipped():
            return f"step {event.step} skipped: its loss or gradient is not finite"
        case events.AmendmentApplied():
            return f"{event.assignment} from step {event.step} on"
        case events.WorkerFailure():
            host = f" on {event.host}" if event.host else ""
            who = "" if event.rank is None else f"rank {event.rank}{host}: "
            return f"{event.what} failure: {who}{event.reason}"
        case events.StoodStill():
            return event.reason
        case events.Recovery():
            return "the workers are started again" + (f" in {event.pause_seconds:.0f}s" if event.pause_seconds else "")
        case events.EngineDied():
            return f"the engine '{event.engine}' is replaced: {event.reason}"
        case events.GroupGrows():
            return f"there is room for more than {event.workers} workers: the group is formed anew"
        case events.StageStarted() if event.from_step:
            return f"continues after step {event.from_step}"
    return None


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say what is waited for, if the block takes long: "Waiting for the other ranks (5s)"."""
    over = threading.Event()
    begin = time.monotonic()

    def tell() -> None:
        pause = WAIT_SECONDS
        while not over.wait(pause):
            say(f"Waiting for {what} ({duration(time.monotonic() - begin)})")
            pause = time.monotonic() - begin

    teller = threading.Thread(target=tell, name="waiting", daemon=True)
    teller.start()
    try:
        yield
    finally:
        over.set()
        teller.join()


def stage_table(run: Run, names: Sequence[str] | None = None) -> None:
    """Print the summary of each stage to standard error."""
    heads: dict[str, Kind] = {"stage": "whole", "state": "whole", "steps": "number", "loss, first → last": "number"}
    listing = Listing(run.name, heads | {"tokens": "number", "time": "number", "tokens/s": "number"})
    for summary in summarize(run, names):
        curves = [_change(summary.first_loss, summary.last_loss)]
        curves += [f"{name} {_change(*losses)}" for name, losses in summary.held_out_losses.items()]
        curves += [f"{name} reward {_change(*rewards)}" for name, rewards in summary.held_out_rewards.items()]
        listing.add_row(
            summary.stage,
            summary.state,
            f"{summary.steps:,}",
            "\n".join(curves),
            f"{summary.tokens:,}",
            duration(summary.seconds),
            f"{summary.tokens_per_second:,.0f}" if summary.tokens_per_second else "",
        )
    console().print(listing)


def _change(first: float | None, last: float | None) -> str:
    return "" if first is None or last is None else f"{first:z.4f} → {last:z.4f}"


def duration(seconds: float) -> str:
    """Seconds as people write them: 4s, 3m05s, 2h07m, 3d04h."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
