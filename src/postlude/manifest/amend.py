"""Amendments: the keys of a stage that may change while it runs, one KEY=VALUE at a time.

What may change says the class that has the key (:mod:`postlude.manifest.change`). A key is the stage's own, such as
``optimizer.lr`` or ``reward.0.weight``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError

from postlude.manifest.alarms import AlarmRule, rules_for
from postlude.manifest.change import EVERY, UNSAID, Change
from postlude.manifest.component import keys_of
from postlude.manifest.problem import ManifestError
from postlude.manifest.refusals import phrase
from postlude.manifest.schema import Manifest, StageConfig, TrainingStage
from postlude.manifest.subschema import STAGE, Subschema
from postlude.manifest.text import parse_inline
from postlude.manifest.value import KeyPath, Origin, dotted
from postlude.nearest import suggestion

StageType = TypeVar("StageType", bound=StageConfig)


@dataclass(frozen=True)
class Amendment:
    """A checked change to one key of a stage."""

    key: str
    before: Any
    value: Any
    change: Change
    """What it means, and from when it holds."""


@dataclass(frozen=True)
class Key:
    """A key of a stage with its present value."""

    key: str
    value: Any
    change: Change
    """Whether it may change while the stage runs."""


def change_of(stage: StageConfig, assignment: str) -> Change:
    """Whether the key of a stage, or of a KEY=VALUE for it, may change while it runs."""
    return change_at(_tree(stage), tuple(assignment.partition("=")[0].strip().split(".")))


def change_at(tree: Any, path: KeyPath, schema: Subschema = STAGE) -> Change:
    """Whether what stands under ``path`` in a ``tree`` of this ``schema`` may change while a stage runs."""
    change = UNSAID
    for part in path:
        keys = tree if isinstance(tree, Mapping) else {}
        if not isinstance(tree, list) and (config := schema.config(keys)) is not None:
            change = config.change_of(str(part)) or change
            every = config.change_of(EVERY)
            if every is not None and not every.allowed:
                return every
        schema, tree = schema.child(tree if isinstance(tree, list) else keys, part), _below(tree, part)
    return change


def keys_with_changes(stage: StageConfig) -> list[Key]:
    """Every key of a stage that has a value, in the manifest's order, and whether it may change while it runs."""
    tree = _tree(stage)
    return [Key(dotted(path), value, change_at(tree, path)) for path, value in _leaves(tree, ())]


def amended(begun: StageType, assignments: Sequence[str]) -> StageType:
    """The config that a stage which began as ``begun`` has after so many amendments. ManifestError for one that may not
    be: its key may not change, is not there, or may not have the value."""
    stage = begun
    for assignment in assignments:
        stage = _apply(begun, stage, assignment)
    return stage


def check_amendment(begun: StageConfig, earlier: Sequence[str], assignment: str) -> Amendment:
    """What an amendment changes of a stage that was amended so before. ManifestError as :func:`amended` does."""
    before = amended(begun, earlier)
    path, _ = _parse(before, assignment)
    after = _apply(begun, before, assignment)
    trees = _tree(before), _tree(after)
    return Amendment(dotted(path), _at(trees[0], path), _at(trees[1], path), change_at(trees[0], path))


def rules_by_step(manifest: Manifest, stage: str, applied: Iterable[Sequence[Any]]) -> dict[int, list[AlarmRule]]:
    """The rules for alarms that hold in a stage from each step on at which they change, 0 being the first, given the
    amendments that were applied, in order: [step, KEY=VALUE] each."""
    config, assignments = manifest.stages[stage], list[str]()
    rules = {0: _rules(manifest, stage, config)}
    for step, assignment in applied:
        assignments.append(assignment)
        if assignment.partition("=")[0].strip().split(".")[0] == "alarms":
            rules[step] = _rules(manifest, stage, amended(config, assignments))
    return rules


def _rules(manifest: Manifest, stage: str, config: StageConfig) -> list[AlarmRule]:
    own = config.alarms if isinstance(config, TrainingStage) else None
    return rules_for([*(manifest.alarms or ()), *(own or ())], stage)


def undoing(begun: StageConfig, assignments: Sequence[str], number: int) -> str:
    """The KEY=VALUE that gives the key of an amendment, by its place among ``assignments``, the value that it had
    before. ManifestError if a later one has changed the same key."""
    change = check_amendment(begun, assignments[:number], assignments[number])
    for later in assignments[number + 1 :]:
        other = later.partition("=")[0].strip()
        if f"{other}.".startswith(f"{change.key}.") or f"{change.key}.".startswith(f"{other}."):
            raise ManifestError(
                f"'{assignments[number]}' was followed by '{later}': undo that one first, or give {change.key} a value."
            )
    return f"{change.key}={json.dumps(change.before)}"


def _apply(begun: StageType, stage: StageType, assignment: str) -> StageType:
    path, value = _parse(stage, assignment)
    tree = _tree(stage)
    above, last = _at(tree, path[:-1]), path[-1]
    if isinstance(above, list):
        above[int(last)] = value
    else:
        above[last] = value
    try:
        after = type(stage).model_validate(tree)
    except ValidationError as error:
        why = "; ".join(phrase(details) for details in error.errors(include_url=False))
        raise ManifestError(f"'{assignment}' cannot be: the value {why}") from error
    if (objection := after.objection(begun, dotted(path))) is not None:
        raise ManifestError(f"'{assignment}' cannot be: {objection}.")
    return after


def _parse(stage: StageConfig, assignment: str) -> tuple[KeyPath, Any]:
    """The key and the value; the key is there, and may change."""
    key, equals, text = assignment.partition("=")
    key = key.strip()
    if not equals:
        raise ManifestError(f"'{assignment}' is not an amendment: it takes KEY=VALUE, such as optimizer.lr=1e-5.")
    path: KeyPath = tuple(key.split("."))
    tree = _tree(stage)
    change = change_at(tree, path)
    is_there = _is_there(tree, path)
    if not change.allowed:
        may = [each.key for each in keys_with_changes(stage) if each.change.allowed]
        why = f"{change.text}." if is_there else f"{suggestion(key, may) or ' There is no such key.'}".strip()
        listed = ", ".join(may) or "nothing"
        raise ManifestError(
            f"'{key}' may not change while a stage of the recipe '{stage.recipe}' runs: {why} What may: {listed}."
        )
    if not is_there:
        raise ManifestError(f"'{assignment}' changes nothing: this stage has no {key}.")
    return path, parse_inline(text, Origin("command line", assignment=assignment)).plain()


def _tree(stage: StageConfig) -> dict[str, Any]:
    """With the keys that are left out where they are null."""
    return {**stage.model_dump(mode="json", by_alias=True), **_unset(stage)}


def _unset(stage: StageConfig) -> dict[str, None]:
    attributes = keys_of(type(stage))
    return {key: None for key in stage.later if getattr(stage, attributes[key]) is None}


def _below(tree: Any, part: str | int) -> Any:
    if isinstance(tree, list):
        return tree[int(part)] if str(part).isdecimal() and int(part) < len(tree) else None
    return tree.get(part) if isinstance(tree, Mapping) else None


def _at(tree: Any, path: KeyPath) -> Any:
    for part in path:
        tree = _below(tree, part)
    return tree


def _is_there(tree: Any, path: KeyPath) -> bool:
    above, last = _at(tree, path[:-1]), path[-1]
    if isinstance(above, list):
        return str(last).isdecimal() and int(last) < len(above)
    return isinstance(above, Mapping) and last in above


def _leaves(tree: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    """What is told as one value: a list of scalars is."""
    below = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list) else ()
    if not tree or not below or (isinstance(tree, list) and not any(isinstance(each, dict | list) for each in tree)):
        yield path, tree
        return
    for key, value in below:
        yield from _leaves(value, (*path, key))
