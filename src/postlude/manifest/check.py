"""Checking a resolved manifest: its schema, and that its parts refer to each other rightly.

Everything that is wrong is gathered, so that one reading mends the whole file.
"""

from __future__ import annotations

import graphlib
from collections.abc import Iterator, Mapping

from pydantic import ValidationError

from postlude.manifest.graph import datasets_used, stages_used
from postlude.manifest.nearest import suggestion_or_list
from postlude.manifest.problem import Problem
from postlude.manifest.refusals import schema_problems
from postlude.manifest.schema import Manifest, StageConfig
from postlude.manifest.shape import STAGE
from postlude.manifest.value import KeyPath, Value, located


def validated(value: Value) -> tuple[Manifest | None, list[Problem]]:
    """The manifest that a resolved value is; None, and what is wrong, if it is none."""
    try:
        manifest = Manifest.model_validate(value.plain())
    except ValidationError as error:
        problems = schema_problems(value, error)
        return None, problems + list(_misreferences(value, _sound_stages(value)))
    problems = list(_misreferences(value, manifest.stages))
    return (None if problems else manifest), problems


def _sound_stages(value: Value) -> dict[str, StageConfig]:
    """The stages that are right in themselves, of a manifest that is wrong somewhere."""
    sound = {}
    for name, stage in value.mapping("stages").items():
        config = STAGE.config(stage.plain()) if stage.is_mapping else None
        if config is not None and issubclass(config, StageConfig):
            try:
                sound[name] = config.model_validate(stage.plain())
            except ValidationError:
                continue
    return sound


def _misreferences(value: Value, stages: Mapping[str, StageConfig]) -> Iterator[Problem]:
    """Names that stand for nothing, circles, and data sets and pools that nothing uses."""

    def at(path: KeyPath, what: str) -> Problem:
        origin, key = located(value, path)
        return Problem(origin, key, what)

    known_data, known_stages = value.mapping("data"), value.mapping("stages")
    for name, stage in stages.items():
        for path, dataset in datasets_used(stage).items():
            if dataset not in known_data:
                what = f"there is no data set '{dataset}'.{suggestion_or_list(dataset, known_data)}"
                yield at(("stages", name, *path), what)
        for path, parent in stages_used(stage).items():
            if parent == name:
                yield at(("stages", name, *path), "a stage cannot start from itself")
            elif parent not in known_stages:
                what = f"there is no stage '{parent}'.{suggestion_or_list(parent, set(known_stages) - {name})}"
                yield at(("stages", name, *path), what)
    for circle in _circles(stages):
        path = next(path for path, parent in stages_used(stages[circle[0]]).items() if parent == circle[1])
        yield at(("stages", circle[0], *path), f"the stages wait for each other: {' -> '.join(circle)}")
    if len(stages) < len(known_stages):
        return  # what the stages that are wrong would use is not known
    used = {dataset for stage in stages.values() for dataset in datasets_used(stage).values()}
    for name in known_data:
        if name not in used:
            yield at(("data", name), "no stage uses this data set. Name it in a stage's 'data', or remove it.")
    pools = {pool for stage in stages.values() for pool in stage.pools}
    compute = value.get("compute")
    for name in compute.mapping("pools") if compute else ():
        if name not in pools:
            what = f"no stage runs on this pool.{suggestion_or_list(name, pools)}"
            yield at(("compute", "pools", name), what)


def _circles(stages: Mapping[str, StageConfig]) -> Iterator[list[str]]:
    """Circles of stages that start from each other, each from a stage along what it needs back to that stage."""
    needs = {
        name: [parent for parent in stages_used(stage).values() if parent in stages and parent != name]
        for name, stage in stages.items()
    }
    while True:
        try:
            graphlib.TopologicalSorter(needs).prepare()
        except graphlib.CycleError as error:
            circle = error.args[1][::-1]
            yield circle
            needs = {n: [p for p in parents if p not in circle] for n, parents in needs.items() if n not in circle}
        else:
            return
