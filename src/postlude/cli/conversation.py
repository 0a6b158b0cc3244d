"""Talking to a model on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from rich.console import Console


def converse(answer: Callable[[Sequence[dict[str, str]]], Iterator[str]]) -> None:
    """Read a line, print the answer as it comes, and so on until the end of input. An empty line forgets all."""
    console = Console()
    console.print("Type a message; an empty line starts anew, Ctrl-D ends.", style="dim")
    messages: list[dict[str, str]] = []
    while True:
        try:
            line = console.input("[bold]> [/bold]")
        except EOFError:
            console.print()
            return
        if not line.strip():
            messages = []
            continue
        messages.append({"role": "user", "content": line})
        reply = ""
        for piece in answer(list(messages)):
            reply += piece
            console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
        console.print()
        messages.append({"role": "assistant", "content": reply})
