"""What the commands print: a report as a table or as JSON on standard output, an error on standard error."""

from __future__ import annotations

import json
import sys
from typing import Any, Protocol

from postlude.errors import UserError

WIDTH = 120
"""Characters of a line where the output is no terminal."""


class Report(Protocol):
    """What a command has found out."""

    def to_json(self) -> Any:
        """The report as objects that JSON knows."""

    def render(self) -> Any:
        """The report as something that rich can print."""


def show(report: Report, as_json: bool) -> None:
    """Print a report; as JSON it is one document and nothing else."""
    if as_json:
        show_json(report.to_json())
    else:
        from rich.console import Console

        console = Console()
        console.print(report.render(), width=None if console.is_terminal else WIDTH)


def show_json(document: Any) -> None:
    """Print one JSON document."""
    sys.stdout.write(json.dumps(document, indent=2) + "\n")


def tell(error: UserError, as_json: bool) -> None:
    """Print an error for a person; who asked for JSON gets that as well, on standard output."""
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True).print(Text.assemble(("Error: ", "bold red"), str(error)), soft_wrap=True)
    if as_json:
        show_json({"error": error.to_json()})
