"""The one way to a terminal: what a text may be told as, and streams that let nothing else pass.

Data, models, file names and libraries bring texts that a terminal would act on: they move its cursor, hide what stands
there, or type for whoever sits before it. Whatever is told passes :func:`shown`, which writes such characters as signs
and leaves secrets out: texts of ours where they are made, all that rich prints by
:class:`postlude.telemetry.screen.Screen`, and what libraries and others' code print by a stream that takes the place of
the process's own (:func:`guard_streams`).
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import IO, Any, TypeVar

from postlude.secrecy import without_secrets

_ACTS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters but tab and line end
    "\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"  # that turn, join or hide text
    "\ud800-\udfff\U000e0000-\U000e007f]"  # halves of characters, which no file takes; tags, which nobody sees
)


def shown(text: str) -> str:
    """A text as it may be told: without secrets, and with a sign (``\\x1b``) for each character that a terminal acts
    on."""
    return visible(without_secrets(text))


def visible(text: str) -> str:
    """A text with signs for the characters that a terminal acts on. Line ends and tabs stay."""
    return text if text.isprintable() and text.isascii() else _ACTS.sub(_sign, text.replace("\r\n", "\n"))


def _sign(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


class Guarded(io.TextIOBase):
    """A stream for what is not ours to print: it says that it is no terminal, and passes on what may be told."""

    def __init__(self, beneath: IO[str]) -> None:
        self.beneath = beneath

    def write(self, text: str) -> int:
        self.beneath.write(shown(text.replace("\r\n", "\n").replace("\r", "\n")))
        return len(text)

    def flush(self) -> None:
        self.beneath.flush()

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.beneath.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self.beneath, "encoding", None) or "utf-8"

    def __getattr__(self, name: str) -> Any:
        return getattr(self.beneath, name)


def guard_streams() -> None:
    """From now on let what is printed in this process, whoever prints it, pass :func:`shown`."""
    if not isinstance(sys.stdout, Guarded):
        sys.stdout = Guarded(sys.stdout)
    if not isinstance(sys.stderr, Guarded):
        sys.stderr = Guarded(sys.stderr)


@contextmanager
def guarded_streams() -> Iterator[None]:
    """The same for as long as the context lasts."""
    before = sys.stdout, sys.stderr
    guard_streams()
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


Command = TypeVar("Command", bound=Callable[..., Any])


def guarded(command: Command) -> Command:
    """A command whose streams are guarded while it works."""

    @wraps(command)
    def work(*arguments: Any, **options: Any) -> Any:
        with guarded_streams():
            return command(*arguments, **options)

    return work  # type: ignore[return-value]
