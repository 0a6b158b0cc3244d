"""Checking a resolved manifest: its schema, and that its parts refer to each other rightly.

Everything that is wrong is gathered, so that one reading mends the whole file.
"""

from __future__ import annotations

import graphlib
from collections.abc import Iterator, Mapping

from pydantic import ValidationError

from postlude.manifest.component import Config
from postlude.manifest.graph import Reference, references
from postlude.manifest.problem import Problem
from postlude.manifest.refusals import schema_problems
from postlude.manifest.schema import Manifest, StageConfig
from postlude.manifest.storage import Places
from postlude.manifest.storage import problems as places_problems
from postlude.manifest.subschema import STAGE
from postlude.manifest.value import KeyPath, Value, locate
from postlude.nearest import suggestion_or_list


def validate(value: Value) -> tuple[Manifest | None, list[Problem]]:
    """The manifest that a resolved value is; None, and what is wrong, if it is none."""
    manifest, problems = None, []
    try:
        manifest = Manifest.model_validate(value.plain())
    except ValidationError as error:
        problems = schema_problems(value, error)
    problems += _misreferences(value)
    return (None if problems else manifest), problems


def validate_places(value: Value) -> tuple[Places | None, list[Problem]]:
    """The rules of a value that has nothing but the key ``storage``; None, and what is wrong, if they are none."""
    problems = []
    try:
        places = _OnlyPlaces.model_validate(value.plain()).storage
    except ValidationError as error:
        places, problems = None, schema_problems(value, error)
    problems += _misplaced(value)
    return (None if problems else places), problems


class _OnlyPlaces(Config):
    storage: Places


def _misplaced(value: Value, run_dir: str | None = None) -> Iterator[Problem]:
    """What is wrong with the rules of storage among each other."""
    for path, what in places_problems({k: rule.plain() for k, rule in value.mapping("storage").items()}, run_dir):
        origin, key = locate(value, ("storage", *path))
        yield Problem(origin, key, what)


def _misreferences(value: Value) -> Iterator[Problem]:
    """Names that stand for nothing, circles, and data sets and pools that nothing uses."""

    def at(path: KeyPath, what: str) -> Problem:
        origin, key = locate(value, path)
        return Problem(origin, key, what)

    data, stages = value.mapping("data"), value.mapping("stages")
    used: dict[str, list[Reference]] = {}
    pools: set[str] = set()
    for name, stage in stages.items():
        recipe = STAGE.config(stage.plain()) if stage.is_mapping else None
        if recipe is not None and issubclass(recipe, StageConfig):
            used[name] = list(references(stage.plain(), STAGE))
            names = [stage.at(tuple(key.split("."))) for key in recipe.pool_keys]
            pools |= {name.content for name in names if name is not None and isinstance(name.content, str)}
            if not stage.text("pool") and recipe.model_fields["pool"].default:
                pools.add(recipe.model_fields["pool"].default)
    for name, named in used.items():
        for reference in named:
            path = ("stages", name, *reference.path)
            if reference.to == "data" and reference.name not in data:
                yield at(path, f"there is no data set '{reference.name}'.{suggestion_or_list(reference.name, data)}")
            elif reference.to == "stage" and reference.name == name:
                yield at(path, "a stage cannot start from itself")
            elif reference.to == "stage" and reference.name not in stages:
                others = suggestion_or_list(reference.name, set(stages) - {name})
                yield at(path, f"there is no stage '{reference.name}'.{others}")
    sources = {name: dataset.at(("source", "from")) for name, dataset in data.items()}
    makers = {name: stage.content for name, stage in sources.items() if stage and isinstance(stage.content, str)}
    for name, maker in makers.items():
        if maker not in stages:
            others = suggestion_or_list(maker, stages)
            yield at(("data", name, "source", "from"), f"there is no stage '{maker}'.{others}")
    for circle in _circles(used, makers):
        path = next(ref.path for ref in used[circle[0]] if circle[1] in (ref.name, makers.get(ref.name)))
        yield at(("stages", circle[0], *path), f"the stages wait for each other: {' -> '.join(circle)}")
    alarms = value.get("alarms")
    for number, rule in enumerate(alarms.plain() if alarms and isinstance(alarms.content, list) else ()):
        chosen = rule.get("stages") if isinstance(rule, dict) else None
        for place, of in enumerate(chosen if isinstance(chosen, list) else ()):
            if isinstance(of, str) and of not in stages:
                what = f"there is no stage '{of}'.{suggestion_or_list(of, stages)}"
                yield at(("alarms", number, "stages", place), what)
    yield from _misplaced(value, value.text("run_dir") or Manifest.model_fields["run_dir"].default)
    if len(used) < len(stages):
        return  # what a stage of an unknown recipe would use is not known
    read = {reference.name for named in used.values() for reference in named if reference.to == "data"}
    for name in data:
        if name not in read:
            yield at(("data", name), "no stage uses this data set. Name it in a stage's 'data', or remove it.")
    compute = value.get("compute")
    for name in compute.mapping("pools") if compute else ():
        if name not in pools:
            what = f"no stage runs on this pool.{suggestion_or_list(name, pools)}"
            yield at(("compute", "pools", name), what)


def _circles(used: Mapping[str, list[Reference]], makers: Mapping[str, str]) -> Iterator[list[str]]:
    """Circles of stages that need each other: from a stage along what it needs, back to that stage.

    A stage that starts from itself is told elsewhere; one that reads the data that it makes is a circle of one.
    """
    needs = {}
    for name, named in used.items():
        started = [ref.name for ref in named if ref.to == "stage" and ref.name != name]
        read = [makers[ref.name] for ref in named if ref.to == "data" and ref.name in makers]
        needs[name] = [need for need in (*started, *read) if need in used]
    while True:
        try:
            graphlib.TopologicalSorter(needs).prepare()
        except graphlib.CycleError as error:
            circle = error.args[1][::-1]
            yield circle
            needs[circle[0]] = [parent for parent in needs[circle[0]] if parent != circle[1]]
        else:
            return
