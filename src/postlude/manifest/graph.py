"""What the stages need from each other and from the rest of the manifest.

A :class:`~postlude.manifest.schema.ModelPlace` anywhere in a stage (its model, a reference, a teacher, a reward
model) is a dependency on the stage that it names; a :data:`~postlude.manifest.schema.Mixture` uses the data sets
that it names, and with them the stages that make those (``source: {from: STAGE}``). All are found by the schema, so
that a recipe need not list them.
"""

from __future__ import annotations

import graphlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from postlude.manifest.schema import DatasetConfig, Manifest, ModelPlace, StageConfig
from postlude.manifest.subschema import Subschema
from postlude.manifest.value import KeyPath


@dataclass(frozen=True)
class Reference:
    """A name in a stage that stands for something outside it."""

    to: Literal["stage", "data"]
    path: KeyPath
    """Of the key within the stage."""
    name: str


def references(content: Any, subschema: Subschema) -> Iterator[Reference]:
    """Every reference in plain content that a subschema describes and that need not be valid."""

    def below(content: Any, subschema: Subschema, path: KeyPath) -> Iterator[Reference]:
        if isinstance(content, list):
            for i, item in enumerate(content):
                yield from below(item, subschema.child(content, i), (*path, i))
        if not isinstance(content, Mapping):
            return
        if subschema.names_datasets:
            yield from (Reference("data", (*path, name), name) for name in content)
            return
        config = subschema.config(content)
        if config is not None and issubclass(config, ModelPlace) and isinstance(content.get("from"), str):
            yield Reference("stage", (*path, "from"), content["from"])
        for key, item in content.items():
            yield from below(item, subschema.child(content, key), (*path, key))

    yield from below(content, subschema, ())


def stages_used(stage: StageConfig) -> dict[KeyPath, str]:
    """The stages whose artifacts a stage starts from, by the path of the key within the stage that names each."""
    return {reference.path: reference.name for reference in _of(stage) if reference.to == "stage"}


def datasets_used(stage: StageConfig) -> dict[KeyPath, str]:
    """The data sets that a stage reads, by the path of the key within the stage that names each."""
    return {reference.path: reference.name for reference in _of(stage) if reference.to == "data"}


def maker_of(dataset: DatasetConfig) -> str | None:
    """The stage that makes a data set, if one does."""
    return dataset.source.model_dump(by_alias=True).get("from")


def needs(manifest: Manifest, stage: str) -> list[str]:
    """The stages that must be done before a stage: those that it names, and those that make the data it reads."""
    config = manifest.stages[stage]
    makers = [maker_of(manifest.data[name]) for name in datasets_used(config).values()]
    return list(dict.fromkeys([*stages_used(config).values(), *filter(None, makers)]))


def ancestors(manifest: Manifest, stage: str) -> set[str]:
    """All the stages that a stage hangs on, directly or through others."""
    direct = needs(manifest, stage)
    return set(direct).union(*(ancestors(manifest, name) for name in direct))


def descendants(manifest: Manifest, stage: str) -> set[str]:
    """All the stages that hang on a stage, directly or through others."""
    return {name for name in manifest.stages if stage in ancestors(manifest, name)}


def _of(stage: StageConfig) -> Iterator[Reference]:
    return references(stage.model_dump(mode="json", by_alias=True), Subschema(type(stage)))


def order(manifest: Manifest) -> list[str]:
    """The names of the stages, each after those that it needs, otherwise as in the manifest."""
    place = {name: i for i, name in enumerate(manifest.stages)}
    sorter = graphlib.TopologicalSorter({name: needs(manifest, name) for name in manifest.stages})
    sorter.prepare()
    ordered: list[str] = []
    ready: list[str] = []
    while sorter.is_active():
        ready += sorter.get_ready()
        ordered.append(min(ready, key=place.__getitem__))
        ready.remove(ordered[-1])
        sorter.done(ordered[-1])
    return ordered
