"""The judge: it runs the tests, in an interpreter that never runs the program. What a test names and has not made
itself is asked of the program's process."""

from __future__ import annotations

import ast
import builtins
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from postlude.rollout.sandbox.exchange import OPERATIONS, Exchange

_ITS_OWN = "__main__"


class Judge(Exchange):
    """Asks a program, and lets it use what a test has given it: functions by calling them, iterators by taking the
    next, objects of a test's own classes by their public attributes."""

    def heard(self, said: str) -> None:
        if said:
            sys.stdout.write(said)

    def serve(self, operation: str, arguments: Sequence[Any]) -> Any:
        given, *others = arguments
        is_own = type(given).__module__ == _ITS_OWN
        if operation == "call":
            if not callable(given):
                raise TypeError("this cannot be called")
            return given(*others[0], **others[1])
        if operation in ("get", "set") and is_own and not str(others[0]).startswith("_"):
            return getattr(given, *others) if operation == "get" else setattr(given, *others)
        if operation in ("iter", "next") or (is_own and operation in OPERATIONS):
            return OPERATIONS[operation](given, *others)
        raise TypeError("a program may not do that with what a test gave it")


class Scope(dict[str, Any]):
    """The names of a test: its own, and behind them those of the program.

    What Python has by itself stays Python's, so that no program puts an ``abs`` or ``sorted`` of its own between its
    answer and what is expected; unless that is the one name of the program in the test.
    """

    def __init__(self, judge: Judge, names: Sequence[str], test: ast.Module) -> None:
        super().__init__(__name__=_ITS_OWN)
        self._judge = judge
        read = {node.id for node in ast.walk(test) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
        asked = {name for name in (read - _made_in(test)) & set(names) if not name.startswith("__")}
        known = {name for name in asked if hasattr(builtins, name) or name in sys.stdlib_module_names}
        self._theirs = asked if asked == known and len(known) == 1 else asked - known
        self._modules = known & sys.stdlib_module_names

    def __missing__(self, name: str) -> Any:
        if name in self._theirs:
            kind, value = self._judge.request("name", name)
            return importlib.import_module(str(value)) if kind == "module" else value
        if name in self._modules:
            return importlib.import_module(name)
        raise KeyError(name)


def _made_in(test: ast.Module) -> set[str]:
    """The names that a test makes for itself."""
    made: set[str] = set()
    for node in ast.walk(test):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            made.add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            made.add(node.name)
        elif isinstance(node, ast.arg):
            made.add(node.arg)
        elif isinstance(node, ast.alias):
            made.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            made.add(node.name)
    return made


def passes(reads: int, writes: int, program: str, test: str) -> bool:
    """Whether the program runs, and the test after it, to the end of both without an exception, and the program's
    process has answered all that it was asked."""
    judge = Judge(reads, writes)
    try:
        tree = ast.parse(test, "<test>")
        names = judge.request("run", program)
        exec(compile(tree, "<test>", "exec"), Scope(judge, list(map(str, names)), tree))
    except BaseException:  # a test says by any exception that the program is wrong
        return False
    return not judge.lost
