"""The process of the program: it runs it, and answers what the judge asks of it. It has nothing that tells the verdict,
and neither the tests nor what they expect."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from postlude.rollout.sandbox.exchange import OPERATIONS, Exchange, Lost

MOST_SAID = 2**20
"""Characters that a program may print between two answers; the rest is lost."""


class _Said(io.StringIO):
    def write(self, text: str) -> int:
        return super().write(text) if self.tell() < MOST_SAID else len(text)


class Program(Exchange):
    """Answers for a program, which the first request gives."""

    def __init__(self, reads: int, writes: int) -> None:
        super().__init__(reads, writes)
        self._module = ModuleType("__main__")
        self._said = sys.stdout = _Said()

    def says(self) -> str:
        said = self._said.getvalue()
        self._said.seek(0)
        self._said.truncate()
        return said

    def serve(self, operation: str, arguments: Sequence[Any]) -> Any:
        if operation == "run":
            sys.modules["__main__"] = self._module
            exec(compile(arguments[0], "<completion>", "exec"), self._module.__dict__)
            return list(self._module.__dict__)
        if operation == "name":
            value = self._module.__dict__[arguments[0]]
            return ("module", value.__name__) if isinstance(value, ModuleType) else ("value", value)
        if operation == "call":
            called, given, named = arguments
            return called(*given, **named)
        if operation == "get":
            return getattr(*arguments)
        if operation == "set":
            return setattr(*arguments)
        return OPERATIONS[operation](*arguments)


def serve(reads: int, writes: int) -> None:
    """Answer until nobody asks any more, or the program ends the process, and never return."""
    try:
        Program(reads, writes).wait()
    except Lost:
        os._exit(0)
    finally:
        os._exit(1)
