"""Explaining a key: its value, where that came from, what it took the place of, and what the key means."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from postlude.manifest.amend import change_at
from postlude.manifest.component import Config, names
from postlude.manifest.load import Resolved
from postlude.manifest.problem import ManifestError
from postlude.manifest.storage import described, places_in, rule_for
from postlude.manifest.subschema import MANIFEST, Subschema
from postlude.manifest.value import SCHEMA_DEFAULT, KeyPath, Setting, dotted
from postlude.nearest import suggestion_or_list


@dataclass(frozen=True)
class Explanation:
    """What there is to tell of a key."""

    head: str
    """The key, and its value where that is one."""
    rows: list[tuple[str, str]]
    """Words with what they say, or the leaves below the key with where each came from."""
    meaning: list[str]
    """Paragraphs."""

    def __str__(self) -> str:
        width = max(len(left) for left, _ in self.rows)
        rows = [f"  {left:<{width}}  {right}" for left, right in self.rows]
        return "\n".join([self.head, *rows, *(f"\n{paragraph}" for paragraph in self.meaning)])


def explain(resolved: Resolved, key: str) -> Explanation:
    """What there is to tell of a key of a manifest, written as in an assignment: ``sft.optimizer.lr``, ``seed``.

    Raises:
        ManifestError: there is no such key, with the nearest that there is.
    """
    path = _path(resolved, key)
    place = _Place(resolved, path)
    if not _is_leaf(place.value):
        rows = [*_leaves(resolved, place.value, path, ()), *_rules(resolved, () if path == ("storage",) else path)]
        return Explanation(f"{dotted(path)}:", rows, place.meaning)
    rows = [*_story(place), *(("storage", rule) for _, rule in _rules(resolved, path))]
    return Explanation(f"{dotted(path)}: {_shown(place.value)}", rows, place.meaning)


def _path(resolved: Resolved, key: str) -> KeyPath:
    path: KeyPath = tuple(key.split("."))
    if path[0] == "defaults":
        raise ManifestError(
            f"'{key}': the defaults have been folded into the stages. Ask for the key of a stage, such as "
            f"{dotted((next(iter(resolved.manifest.stages)), *path[1:]))}."
        )
    if path[0] not in MANIFEST.keys({}) and path[0] in resolved.manifest.stages:
        return ("stages", *path)
    return path


class _Place:
    """One key of a resolved manifest, and what the schema says of it."""

    def __init__(self, resolved: Resolved, path: KeyPath) -> None:
        tree: Any = resolved.tree
        subschema, field, self.named_component = MANIFEST, None, None
        for i, part in enumerate(path):
            content = tree if isinstance(tree, dict) else {}
            field, named = subschema.field(content, str(part)), subschema.branch_for(content).named
            self.named_component = named if named is not None and named.key == part else None
            self.component_doc = _documentation(subschema.config(content)) if self.named_component else ""
            if isinstance(tree, list) and str(part).isdecimal() and int(part) < len(tree):
                below = tree[int(part)]
            elif part in content:
                below = content[part]
            elif field is not None:
                below = None  # a null that nobody asked for is not in the tree
            else:
                known = {*content, *subschema.keys(content), *(resolved.manifest.stages if i == 0 else ())}
                above = f" in '{dotted(path[:i])}'" if i else ""
                near = suggestion_or_list(str(part), known) if known else ""
                raise ManifestError(f"{resolved.name} has no key '{part}'{above}.{near}")
            subschema, tree = subschema.child(tree, part), below
        self.value, self.field, self.subschema = tree, field, subschema
        self.change = change_at(resolved.tree, path, MANIFEST)
        try:
            self.history = resolved.history(path)
        except KeyError:
            self.history = [Setting(str(path[-1]), None, SCHEMA_DEFAULT)]

    @property
    def meaning(self) -> list[str]:
        """The documentation of the key, and of the component or config that stands there, in paragraphs; and whether it
        may change while a stage runs."""
        parts = [self.field.description or "" if self.field else "", self.component_doc]
        if isinstance(self.value, dict):
            parts.append(_documentation(self.subschema.config(self.value)))
        paragraphs = "\n\n".join(dict.fromkeys(part for part in parts if part)).split("\n\n")
        return [*(" ".join(paragraph.split()) for paragraph in paragraphs if paragraph), str(self.change)]


def _story(place: _Place) -> Iterator[tuple[str, str]]:
    now, *before = place.history
    yield "from", str(now.origin)
    for setting in before:
        named = "" if setting.key == now.key else f"{setting.key}: "
        yield "overrode", f"{named}{_shown(setting.value)} ({setting.origin})"
    if place.named_component is not None:
        yield "choices", ", ".join(names(place.named_component.kind))
    elif place.field is not None:
        default = _default(place.field)
        if default is not None:
            yield "default", default
        choices = _choices(Subschema.of_field(place.field))
        if choices:
            yield "choices", ", ".join(choices)


def _leaves(resolved: Resolved, tree: Any, path: KeyPath, below: KeyPath) -> Iterator[tuple[str, str]]:
    """Every leaf of a subtree, and where it came from."""
    if not _is_leaf(tree):
        for key, item in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _leaves(resolved, item, path, (*below, key))
    else:
        yield f"{dotted(below)}: {_shown(tree)}", str(resolved.origin((*path, *below)))


def _rules(resolved: Resolved, path: KeyPath) -> Iterator[tuple[str, str]]:
    """Each place that the manifest names below a key, and the rule of ``storage`` that it falls under."""
    rules = resolved.manifest.storage or {}
    for key, uri in places_in(resolved.tree) if rules else ():
        if key[: len(path)] == path:
            found = rule_for(rules, uri)
            yield f"{dotted(key)}: {uri}", f"under {described(*found)}" if found else "under no rule"


def _is_leaf(tree: Any) -> bool:
    """Whether a value is told as one: a list of scalars was said as a whole."""
    if isinstance(tree, list):
        return not any(isinstance(item, (dict, list)) for item in tree)
    return not isinstance(tree, dict) or not tree


def _default(field: FieldInfo) -> str | None:
    if field.is_required():
        return "none: the key is required"
    if isinstance(field.default, Config) or field.default_factory is not None:
        return None
    return _shown(field.default)


def _choices(subschema: Subschema) -> list[str]:
    """What may stand there, where that is a list of words."""
    choices: list[str] = []
    for branch in subschema.branches():
        if get_origin(branch.annotation) is Literal:
            choices += [_shown(choice) for choice in get_args(branch.annotation)]
        elif branch.named is not None:
            choices += names(branch.named.kind)
    return choices


def _documentation(config: type[Config] | None) -> str:
    """The first paragraph of a class's docstring."""
    return inspect.cleandoc(config.__doc__ or "").partition("\n\n")[0] if config else ""


def _shown(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
