"""What the stages need from each other and from the rest of the manifest, read off their configs.

A :class:`~postlude.manifest.schema.ModelFrom` anywhere in a stage (its model, a reference, a teacher, a reward
model) is a dependency on the stage that it names; a :data:`~postlude.manifest.schema.Mixture` uses the data sets
that it names.
"""

from __future__ import annotations

import graphlib
from collections.abc import Iterator, Mapping
from typing import Any

from postlude.manifest.component import Config, attribute_of, keys_of
from postlude.manifest.schema import Manifest, ModelFrom, StageConfig
from postlude.manifest.shape import Shape
from postlude.manifest.value import KeyPath


def stages_used(stage: StageConfig) -> dict[KeyPath, str]:
    """The stages whose artifacts a stage starts from, by the path of the key within the stage that names each."""
    return {(*path, "from"): start.from_ for path, start in _models(stage, ()) if start.from_ is not None}


def datasets_used(stage: StageConfig) -> dict[KeyPath, str]:
    """The data sets that a stage reads, by the path of the key within the stage that names each."""
    return dict(_datasets(stage, ()))


def order(manifest: Manifest) -> list[str]:
    """The names of the stages, each after those that it needs, otherwise as in the manifest."""
    place = {name: i for i, name in enumerate(manifest.stages)}
    sorter = graphlib.TopologicalSorter({name: stages_used(stage).values() for name, stage in manifest.stages.items()})
    sorter.prepare()
    ordered: list[str] = []
    ready: list[str] = []
    while sorter.is_active():
        ready += sorter.get_ready()
        ordered.append(min(ready, key=place.__getitem__))
        ready.remove(ordered[-1])
        sorter.done(ordered[-1])
    return ordered


def _models(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, ModelFrom]]:
    if isinstance(value, ModelFrom):
        yield path, value
    for key, item in _items(value):
        yield from _models(item, (*path, key))


def _datasets(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    for key, item in _items(value):
        field = type(value).model_fields.get(attribute_of(type(value), str(key))) if isinstance(value, Config) else None
        if field is not None and Shape.of_field(field).names_datasets:
            yield from (((*path, key, name), name) for name in item or ())
        else:
            yield from _datasets(item, (*path, key))


def _items(value: Any) -> Iterator[tuple[str | int, Any]]:
    """What a part of a validated manifest holds, by the keys that the manifest uses."""
    if isinstance(value, Config):
        yield from ((key, getattr(value, attribute)) for key, attribute in keys_of(type(value)).items())
    elif isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, list):
        yield from enumerate(value)
