"""What the schema refuses, told in the manifest's own terms: file, line and column, key, nearest known name.

Pydantic's errors point into a tree of plain values; the values know their places. A union tries each of its
alternatives and reports what all of them say: only what the one that fits best says is told.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from postlude.manifest.assignments import TOP_LEVEL_KEYS
from postlude.manifest.problem import Problem
from postlude.manifest.subschema import MANIFEST
from postlude.manifest.value import KeyPath, Value, locate
from postlude.nearest import suggestion, suggestion_or_list
from postlude.secrecy import told

_TYPES = {
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "finite_number": "a finite number",
    "float_type": "a number",
    "int_from_float": "a whole number",
    "int_type": "a whole number",
    "list_type": "a list",
    "model_type": "a mapping",
    "string_type": "text",
}


def schema_problems(value: Value, error: ValidationError) -> list[Problem]:
    """Each thing that the schema refuses in a resolved manifest."""
    refusals: list[_Refusal] = []
    unions: dict[KeyPath, list[_Refusal]] = defaultdict(list)
    for details in error.errors(include_url=False):
        refusal = _refusal(value, details)
        (refusals if refusal.union is None else unions[refusal.union]).append(refusal)
    for alternatives in unions.values():
        refusals += _best_fit(alternatives)
    problems = []
    for refusal in refusals:
        origin, key = locate(value, refusal.path)
        problems.append(Problem(origin, key, refusal.what + refusal.instead))
    return problems


@dataclass(frozen=True)
class _Refusal:
    path: KeyPath
    union: KeyPath | None
    """Where an alternative had to be chosen on the way, if anywhere."""
    is_type: bool
    """Whether the value is of another type altogether."""
    what: str
    instead: str
    """What stands there, as the end of the sentence."""


def _refusal(value: Value, details: ErrorDetails) -> _Refusal:
    kind = details["type"]
    path, union, known = _walk(value, details["loc"], kind == "missing")
    what, instead = _phrase(details)
    if kind == "extra_forbidden":
        if len(path) == 1 and value.content[path[0]].origin.assignment:
            known = [*known, *value.mapping("stages")]
        what, instead = f"unknown key.{suggestion_or_list(str(path[-1]), known)}", ""
    elif kind in ("component_name", "component_unusable"):
        name = (*path, details["ctx"]["key"])
        path = name if value.at(name) is not None else path
    is_type = kind.endswith("_type") or (kind == "literal_error" and not isinstance(details["input"], str))
    return _Refusal(path, union, is_type, what, instead)


def phrase(details: ErrorDetails) -> str:
    """What pydantic says of a value, in the words of the manifest."""
    return "".join(_phrase(details))


def _phrase(details: ErrorDetails) -> tuple[str, str]:
    """What must be, and what is found instead."""
    kind, context, content = details["type"], details.get("ctx", {}), details["input"]
    if kind == "missing":
        return "this key is missing", ""
    if kind == "too_short":
        return "must not be empty", ""
    if kind in _TYPES:
        return f"must be {_TYPES[kind]}", _instead(content)
    if kind == "component_type":
        return details["msg"], _instead(content)
    if "error" in context:
        return str(context["error"]), ""
    if isinstance(content, (dict, list)) or kind == "component_unusable":
        return details["msg"], ""
    near = suggestion(str(content), re.findall(r"'([^']*)'", context["expected"])) if kind == "literal_error" else ""
    return re.sub(r"^\w+ should ", "must ", details["msg"]), _instead(content) + (f".{near}" if near else "")


def _walk(value: Value, location: Sequence[str | int], is_missing: bool) -> tuple[KeyPath, KeyPath | None, list[str]]:
    """The path of keys in a pydantic location, which has names of alternatives in between; the path where the
    first of those was met; and the keys known beside the last one."""
    path: KeyPath = ()
    union: KeyPath | None = None
    known: list[str] = list(TOP_LEVEL_KEYS)
    subschema, here = MANIFEST, value
    for i, part in enumerate(location):
        here = subschema.expand(here)
        content = here.plain() if here.is_mapping else {}
        keys = subschema.keys(content) if path else known
        below = here.get(part)
        if below is None and part not in keys and not (is_missing and i == len(location) - 1):
            union = path if union is None else union
            continue
        path, known = (*path, part), keys
        if below is None:
            break
        subschema, here = subschema.child(content, part), below
    return path, union, known


def _best_fit(alternatives: list[_Refusal]) -> list[_Refusal]:
    """What to tell of several alternatives' refusals: those that got furthest into the value, those that at least
    like its type; what is left is one sentence."""
    furthest = max(len(refusal.path) for refusal in alternatives)
    best = [refusal for refusal in alternatives if len(refusal.path) == furthest]
    if furthest > len(best[0].union or ()):
        return best
    best = [refusal for refusal in best if not refusal.is_type] or best
    first = best[0]
    others = dict.fromkeys(refusal.what.removeprefix("must be ") for refusal in best[1:])
    what = ", or ".join([first.what, *others])
    return [_Refusal(first.path, None, first.is_type, what, first.instead)]


def _instead(content: Any) -> str:
    """What stands there instead, as the manifest writes it."""
    if isinstance(content, dict):
        shown = "a mapping"
    elif isinstance(content, list):
        shown = "a list"
    elif content is None:
        shown = "null"
    elif isinstance(content, bool):
        shown = str(content).lower()
    else:
        text = repr(told(content))
        shown = text if len(text) <= 60 else f"{text[:57]}..."
    return f", found {shown}"
