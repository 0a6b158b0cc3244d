"""Loading a manifest: from text and a command line to the checked manifest that knows where each value came from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from postlude.manifest import assignments
from postlude.manifest.check import validate, validate_places
from postlude.manifest.component import BrokenExtension, import_plugin
from postlude.manifest.problem import Problem, refusal
from postlude.manifest.resolve import resolve
from postlude.manifest.schema import Manifest
from postlude.manifest.storage import Places
from postlude.manifest.subschema import MANIFEST, Subschema
from postlude.manifest.text import parse
from postlude.manifest.value import SCHEMA_DEFAULT, KeyPath, Origin, Setting, Value
from postlude.nearest import suggestion_or_list
from postlude.secrecy import learn_from, learn_variable, stand_in


@dataclass(frozen=True)
class Resolved:
    """A manifest with its defaults folded in and everything checked."""

    name: str
    """What the text is called: its path or URI."""
    manifest: Manifest
    tree: dict[str, Any]
    """The same as plain data that JSON knows, the schema's defaults included, apart from those that are null.
    :func:`restore` makes the manifest of it again."""
    value: Value
    """What the text and the command line say."""

    def origin(self, key: str | KeyPath) -> Origin:
        """Where the value of a key of ``tree`` came from. KeyError if there is no such key."""
        return self.history(key)[0].origin

    def history(self, key: str | KeyPath) -> list[Setting]:
        """The value of a key of ``tree`` as it stands, and then each that it took the place of, nearest first.

        KeyError if there is no such key.
        """
        path = tuple(key.split(".")) if isinstance(key, str) else key
        plain = _descend(self.tree, path)
        value = _written_at(self.value, path)
        name = str(path[-1]) if path else ""
        if value is None:
            return [Setting(name, plain, SCHEMA_DEFAULT)]
        settings = [Setting(name, _shown(path, value), value.origin)]
        while value.previous is not None:
            name, value = value.previous
            settings.append(Setting(name, _shown(path, value), value.origin))
        return settings


def load(text: str | bytes, name: str, overrides: Sequence[str] = ()) -> Resolved:
    """Read, resolve and check a manifest. ``name`` is what messages call it, ``overrides`` are KEY=VALUE.

    Raises:
        ManifestError: with every problem, each with its place and key.
    """
    written = parse(text, name)
    assigned, problems = assignments.layer(overrides, written.mapping("stages"))
    for layer in (written, assigned):
        _learn(layer)
    problems += _import_plugins(written, assigned)
    value, more = resolve(written, assigned)
    problems += more
    manifest, more = validate(value)
    problems += more
    if manifest is None or problems:
        raise refusal(name, problems)
    _refuse_without_effect(assigned, value, name)
    tree = _without_default_nulls(manifest.model_dump(mode="json", by_alias=True), value, MANIFEST)
    return Resolved(name, manifest, tree, value)


def load_places(text: str | bytes, name: str) -> Places:
    """What a file says under ``storage``: a manifest, a run's lock, or one that has nothing else. ManifestError."""
    value = parse(text, name)
    written = value.get("storage") or value.at(("manifest", "storage"))
    if written is None:
        what = "it has no key 'storage', in which the rules would stand by their prefixes"
        raise refusal(name, [Problem(value.origin, "", what)])
    places, problems = validate_places(replace(value, content={"storage": written}))
    if places is None:
        raise refusal(name, problems)
    return places


def restore(tree: dict[str, Any]) -> Manifest:
    """The manifest that a resolved tree describes, in any process."""
    learn_from(tree)
    for module in tree.get("plugins", ()):
        import_plugin(module)
    return Manifest.model_validate(tree)


def _learn(layer: Value) -> None:
    """Know the secrets of a manifest before anything is told of it."""
    document = layer.plain()
    learn_from(document)
    compute = document.get("compute")
    given = compute.get("environment") if isinstance(compute, dict) else None
    for name, value in given.items() if isinstance(given, dict) else ():
        if isinstance(value, str):
            learn_variable(name, value)


def _import_plugins(written: Value, assigned: Value) -> list[Problem]:
    """Import the modules that register components, before anything is looked up."""
    problems = []
    plugins = assigned.get("plugins") or written.get("plugins")
    for i, module in enumerate(plugins.content if plugins and isinstance(plugins.content, list) else ()):
        if isinstance(module.content, str):
            try:
                import_plugin(module.content)
            except BrokenExtension as error:
                problems.append(Problem(module.origin, f"plugins.{i}", str(error)))
    return problems


def _refuse_without_effect(assigned: Value, value: Value, name: str) -> None:
    """An assignment to a default that every stage sets itself would be ignored in silence."""
    effective = {leaf.origin for leaf in value.leaves()}
    what = "no effect: the stages set this key themselves"
    problems = [
        Problem(leaf.origin, leaf.origin.assignment.partition("=")[0], what)
        for leaf in assigned.leaves()
        if leaf.origin.assignment and leaf.origin not in effective
    ]
    if problems:
        raise refusal(name, problems)


def _written_at(value: Value, path: KeyPath) -> Value | None:
    """What was written at a path of the tree; None where the schema's default stands."""
    here, subschema = value, MANIFEST
    for part in path:
        here = subschema.expand(here)
        content = here.plain()
        below = here.get(part) or subschema.name_origin(here, str(part))
        if below is None or below.origin == SCHEMA_DEFAULT:
            return None
        here, subschema = below, subschema.child(content, part)
    return here


def _shown(path: KeyPath, value: Value) -> Any:
    """A value as the tree has it: of a variable for processes a digest."""
    content = value.plain()
    is_variable = path[:2] == ("compute", "environment") and len(path) == 3
    return stand_in(str(path[2]), content) if is_variable and isinstance(content, str) else content


def _descend(tree: Any, path: Iterable[str | int]) -> Any:
    for part in path:
        if isinstance(tree, dict) and part in tree:
            tree = tree[part]
        elif isinstance(tree, list) and str(part).isdecimal() and int(part) < len(tree):
            tree = tree[int(part)]
        else:
            known = tree if isinstance(tree, dict) else ()
            raise KeyError(f"there is no '{part}'.{suggestion_or_list(str(part), known)}")
    return tree


def _without_default_nulls(tree: Any, value: Value | None, subschema: Subschema) -> Any:
    """The tree without the nulls that nobody asked for."""
    if value is not None:
        value = subschema.expand(value)
    if isinstance(tree, list):
        return [
            _without_default_nulls(item, value.get(i) if value else None, subschema.child(tree, i))
            for i, item in enumerate(tree)
        ]
    if not isinstance(tree, dict):
        return tree
    kept = {}
    for key, item in tree.items():
        below = value.get(key) if value else None
        if item is not None or below is not None:
            kept[key] = _without_default_nulls(item, below, subschema.child(tree, key))
    return kept
