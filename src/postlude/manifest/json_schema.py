"""The JSON Schema of a manifest, for editors: completion, documentation and most errors while one types.

It describes the text before it is resolved. A stage may leave to the defaults what its recipe requires, so nothing
is required of a stage; what only shows in the whole (a name that stands for nothing) is left to ``validate``.
"""

from __future__ import annotations

from typing import Any

from postlude.manifest.component import names
from postlude.manifest.schema import Manifest

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_DEFINITIONS = "#/$defs/"
_RELAXED = "Inherited"
"""Begins the names of the definitions that stages and defaults use."""

Schema = dict[str, Any]


def schema() -> Schema:
    """The JSON Schema, with the components that are registered now."""
    document = _close(Manifest.model_json_schema(by_alias=True))
    definitions = document.pop("$defs")
    relaxed = {_RELAXED + name: _relax(definition) for name, definition in definitions.items()}
    stages = document["properties"]["stages"]
    (pattern, stage), *_ = stages["patternProperties"].items()
    choices = [_relax(choice) for choice in stage["anyOf"]]
    stages["patternProperties"][pattern] = {"anyOf": [{"type": "null"}, *choices]}
    bodies = [relaxed[choice["$ref"].removeprefix(_DEFINITIONS)] if "$ref" in choice else choice for choice in choices]
    document["properties"]["defaults"] = {
        "title": "Defaults",
        "description": "What every stage inherits whose recipe has the key; a stage's own value comes first.",
        "anyOf": [{"type": "null"}, _union([body for body in bodies if "properties" in body])],
    }
    document["$defs"] = _reachable(document, {**definitions, **relaxed})
    return {"$schema": _DIALECT, **document, "title": "Postlude manifest"}


def _union(recipes: list[Schema]) -> Schema:
    """A mapping of any recipe's keys, each as some recipe has it."""
    alternatives: dict[str, list[Schema]] = {}
    for recipe in recipes:
        for key, value in recipe["properties"].items():
            known = alternatives.setdefault(key, [])
            if value not in known:
                known.append(value)
    properties = {key: each[0] if len(each) == 1 else {"anyOf": each} for key, each in alternatives.items()}
    properties["recipe"] = {"enum": names("recipes"), "description": "The recipe of stages that name none."}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _relax(schema: Any) -> Any:
    """A copy that requires nothing, down to the definitions that it refers to."""
    if isinstance(schema, list):
        return [_relax(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    is_keyword = isinstance(schema.get("required"), list)  # and no property that is called so
    copy = {key: _relax(value) for key, value in schema.items() if not (key == "required" and is_keyword)}
    if isinstance(copy.get("$ref"), str):
        copy["$ref"] = _DEFINITIONS + _RELAXED + copy["$ref"].removeprefix(_DEFINITIONS)
    return copy


def _close(schema: Any) -> Any:
    """A copy in which a mapping with a pattern for its names takes no other names."""
    if isinstance(schema, list):
        return [_close(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    copy = {key: _close(value) for key, value in schema.items()}
    if "patternProperties" in copy and "properties" not in copy:
        copy.setdefault("additionalProperties", False)
    return copy


def _reachable(document: Schema, definitions: dict[str, Schema]) -> dict[str, Schema]:
    """The definitions that the document uses, directly or through others."""
    used: dict[str, Schema] = {}
    waiting: list[Any] = [document]
    while waiting:
        item = waiting.pop()
        if isinstance(item, list):
            waiting += item
        elif isinstance(item, dict):
            waiting += item.values()
            reference = item.get("$ref")
            if isinstance(reference, str):
                name = reference.removeprefix(_DEFINITIONS)
                if name not in used:
                    used[name] = definitions[name]
                    waiting.append(definitions[name])
    return dict(sorted(used.items()))
