"""Loading a manifest: from text and a command line to the checked manifest that knows where each value came from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from postlude.manifest import assignments
from postlude.manifest.check import validated
from postlude.manifest.component import BrokenExtension, import_plugin
from postlude.manifest.problem import Problem, refusal
from postlude.manifest.resolve import resolve
from postlude.manifest.schema import Manifest
from postlude.manifest.shape import MANIFEST, Shape
from postlude.manifest.text import parse
from postlude.manifest.value import SCHEMA_DEFAULT, KeyPath, Origin, Setting, Value
from postlude.nearest import suggestion_or_list


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
    """What was said, by the text and the command line."""

    def origin(self, key: str | KeyPath) -> Origin:
        """Where the value of a key of ``tree`` came from. KeyError if there is no such key."""
        return self.history(key)[0].origin

    def history(self, key: str | KeyPath) -> list[Setting]:
        """The value of a key of ``tree`` as it stands, and then each that it took the place of, nearest first.

        KeyError if there is no such key.
        """
        path = tuple(key.split(".")) if isinstance(key, str) else key
        stands = _descend(self.tree, path)
        said = _said(self.value, path)
        name = str(path[-1]) if path else ""
        if said is None:
            return [Setting(name, stands, SCHEMA_DEFAULT)]
        settings = [Setting(name, said.plain(), said.origin)]
        while said.previous is not None:
            name, said = said.previous
            settings.append(Setting(name, said.plain(), said.origin))
        return settings


def load(text: str | bytes, name: str, overrides: Sequence[str] = ()) -> Resolved:
    """Read, resolve and check a manifest. ``name`` is what messages call it, ``overrides`` are KEY=VALUE.

    Raises:
        ManifestError: with every problem, each with its place and key.
    """
    written = parse(text, name)
    said, problems = assignments.layer(overrides, written.mapping("stages"))
    problems += _import_plugins(written, said)
    value, more = resolve(written, said)
    problems += more
    manifest, more = validated(value)
    problems += more
    if manifest is None or problems:
        raise refusal(name, problems)
    _refuse_without_effect(said, value, name)
    tree = _without_default_nulls(manifest.model_dump(mode="json", by_alias=True), value, MANIFEST)
    return Resolved(name, manifest, tree, value)


def restore(tree: dict[str, Any]) -> Manifest:
    """The manifest that a resolved tree describes, in any process."""
    for module in tree.get("plugins", ()):
        import_plugin(module)
    return Manifest.model_validate(tree)


def _import_plugins(written: Value, said: Value) -> list[Problem]:
    """Import the modules that register components, before anything is looked up."""
    problems = []
    plugins = said.get("plugins") or written.get("plugins")
    for i, module in enumerate(plugins.content if plugins and isinstance(plugins.content, list) else ()):
        if isinstance(module.content, str):
            try:
                import_plugin(module.content)
            except BrokenExtension as error:
                problems.append(Problem(module.origin, f"plugins.{i}", str(error)))
    return problems


def _refuse_without_effect(said: Value, value: Value, name: str) -> None:
    """An assignment to a default that every stage sets itself would be ignored in silence."""
    effective = {leaf.origin for leaf in value.leaves()}
    what = "no effect: the stages set this key themselves"
    problems = [
        Problem(leaf.origin, leaf.origin.assignment.partition("=")[0], what)
        for leaf in said.leaves()
        if leaf.origin.assignment and leaf.origin not in effective
    ]
    if problems:
        raise refusal(name, problems)


def _said(value: Value, path: KeyPath) -> Value | None:
    """What was said at a path of the tree; None where the schema's default stands."""
    here, shape = value, MANIFEST
    for part in path:
        here = shape.expanded(here)
        content = here.plain()
        below = here.get(part) or shape.name_origin(here, str(part))
        if below is None or below.origin == SCHEMA_DEFAULT:
            return None
        here, shape = below, shape.child(content, part)
    return here


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


def _without_default_nulls(tree: Any, value: Value | None, shape: Shape) -> Any:
    """The tree without the nulls that nobody asked for."""
    if value is not None:
        value = shape.expanded(value)
    if isinstance(tree, list):
        return [
            _without_default_nulls(item, value.get(i) if value else None, shape.child(tree, i))
            for i, item in enumerate(tree)
        ]
    if not isinstance(tree, dict):
        return tree
    kept = {}
    for key, item in tree.items():
        below = value.get(key) if value else None
        if item is not None or below is not None:
            kept[key] = _without_default_nulls(item, below, shape.child(tree, key))
    return kept
