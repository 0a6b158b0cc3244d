"""The KEY=VALUE of the command line, read as one more layer of the manifest."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace

from postlude.manifest.component import keys_of
from postlude.manifest.problem import ManifestError, Problem
from postlude.manifest.schema import Manifest
from postlude.manifest.text import parse_inline
from postlude.manifest.value import KeyPath, Origin, Value, dotted, without_value
from postlude.secrecy import told

HANDED_ON = "POSTLUDE_ASSIGNMENTS"
"""The variable with assignments for the command that is started: a list as JSON."""
TOP_LEVEL_KEYS = (*keys_of(Manifest), "defaults")


def holds_secret(assignment: str) -> bool:
    """Whether a KEY=VALUE is not to be repeated on a command line, which everybody on a machine can read."""
    return without_value(assignment) != assignment or told(assignment) != assignment


def handed_on() -> list[str]:
    """What the process that started this one left in the environment, so that it stands on no command line. Once."""
    return list(json.loads(os.environ.pop(HANDED_ON, "[]")))


def layer(assignments: Iterable[str], stages: Iterable[str]) -> tuple[Value, list[Problem]]:
    """What the assignments say, as one mapping from the root, and what is wrong with them.

    A key begins with a key of the manifest or, for short, with the name of one of the ``stages``.
    """
    stages = set(stages)
    problems: list[Problem] = []
    root = Value({}, Origin("command line"), partial=True)
    for assignment in assignments:
        origin = Origin("command line", assignment=assignment)
        key, equals, text = assignment.partition("=")
        path: KeyPath = tuple(key.strip().split("."))
        if not equals or not all(path):
            what = "an assignment is KEY=VALUE, such as sft.optimizer.lr=1e-4"
            problems.append(Problem(origin, "", what))
            continue
        if path[0] not in TOP_LEVEL_KEYS and path[0] in stages:
            path = ("stages", *path)
        try:
            value = parse_inline(text, origin)
        except ManifestError as error:
            problems += [replace(problem, key=dotted(path)) for problem in error.problems]
            continue
        for part in reversed(path):
            value = Value({part: replace(value, key_origin=origin)}, origin, partial=True)
        root = _join(root, value, (), problems)
    return root, problems


def _join(first: Value, second: Value, path: KeyPath, problems: list[Problem]) -> Value:
    """Two assignments side by side. None outranks the other, so that both saying the same key is a problem."""
    if not (isinstance(first.content, Mapping) and isinstance(second.content, Mapping)):
        what = f"this key is given twice, the other time by {first.origin.place}"
        problems.append(Problem(second.origin, dotted(path), what))
        return second
    content = dict(first.content)
    for key, value in second.content.items():
        content[key] = _join(content[key], value, (*path, key), problems) if key in content else value
    return replace(first, content=content, partial=first.partial and second.partial)
