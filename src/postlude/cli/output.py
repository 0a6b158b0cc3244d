"""What the commands print: a report as a table or as JSON on standard output, an error on standard error."""

from __future__ import annotations

import json
import sys
from typing import Any, Protocol

from postlude.errors import UserError
from postlude.secrecy import told


class Report(Protocol):
    """What a command has found out."""

    def to_json(self) -> Any:
        """The report as objects that JSON knows."""

    def render(self) -> Any:
        """The report as something that rich can print."""


def show_report(report: Report, as_json: bool) -> None:
    """Print a report; as JSON it is one document and nothing else."""
    if as_json:
        show_json(report.to_json())
    else:
        show(report.render())


def show(*parts: Any) -> None:
    """Print texts as they are, and what else rich can print, one below the other."""
    from rich.text import Text

    from postlude.telemetry.guard import shown
    from postlude.telemetry.screen import open_console

    open_console().print(*(Text(shown(part)) if isinstance(part, str) else part for part in parts), sep="\n")


def say_answer(text: str) -> None:
    """Print what a model answers: as it is into a file or a pipe, which somebody reads as data."""
    from postlude.telemetry.guard import Guarded

    stream = sys.stdout
    if isinstance(stream, Guarded) and not stream.beneath.isatty():
        stream = stream.beneath
    stream.write(text)
    stream.flush()


def announce(text: str) -> None:
    """Print sentences: what was done, and what comes next."""
    from postlude.telemetry.screen import open_console, prose

    prose(open_console(), text)


def show_address(address: str, amend: str, read: str, as_json: bool) -> None:
    """Print where a page is, with its tokens, once, as they are: whoever reads standard output is to have them."""
    from postlude.telemetry.guard import Guarded

    addresses = {"amend": f"{address}/?token={amend}", "read": f"{address}/?token={read}"}
    text = (
        json.dumps(addresses)
        if as_json
        else (f"To look and to amend: {addresses['amend']}\nOnly to look:         {addresses['read']}\nCtrl-C ends it.")
    )
    stream = sys.stdout.beneath if isinstance(sys.stdout, Guarded) else sys.stdout
    stream.write(text + "\n")
    stream.flush()


def show_json(document: Any) -> None:
    """Print one JSON document, whose escapes are JSON's own."""
    sys.stdout.write(json.dumps(told(document), indent=2) + "\n")


def tell(error: UserError, as_json: bool) -> None:
    """Print an error for a person; who asked for JSON gets that as well, on standard output."""
    from postlude.telemetry.screen import open_console, prose

    prose(open_console(stderr=True), str(error), warning="Error: ")
    if as_json:
        show_json({"error": error.to_json()})
