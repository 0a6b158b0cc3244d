"""What the schema lets stand at a place in the manifest: which keys it has, and which of them hold components.

Inheritance, provenance, messages and explanations all need it before, or without, a validated manifest. It is
read off pydantic's fields, so that there is one account of the schema.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from postlude.manifest.component import Config, Named, keys_of
from postlude.manifest.schema import Manifest, NamesDatasets
from postlude.manifest.value import SCHEMA_DEFAULT, Value


@dataclass(frozen=True)
class Subschema:
    """One annotation of the schema: a config, a component to be named, a list, a mapping, a scalar, or a choice."""

    annotation: Any
    metadata: tuple[Any, ...] = ()

    @staticmethod
    def of_field(field: FieldInfo) -> Subschema:
        """What a field may hold."""
        return Subschema(field.annotation, tuple(field.metadata))

    def branches(self) -> Iterator[Subschema]:
        """The alternatives of a union; the subschema itself if it is none."""
        if get_origin(self.annotation) is Annotated:
            inner, *more = get_args(self.annotation)
            yield from Subschema(inner, (*self.metadata, *more)).branches()
        elif get_origin(self.annotation) in (Union, UnionType):
            for branch in get_args(self.annotation):
                yield from Subschema(branch, self.metadata).branches()
        else:
            yield self

    @property
    def named(self) -> Named | None:
        """The registry that a component is to be named from."""
        return next((item for item in self.metadata if isinstance(item, Named)), None)

    @property
    def names_datasets(self) -> bool:
        """Whether the keys are names of data sets."""
        return any(isinstance(item, NamesDatasets) for branch in self.branches() for item in branch.metadata)

    def branch_for(self, content: Any) -> Subschema:
        """The alternative that a value of this type is meant for."""
        branches = list(self.branches())
        return next((branch for branch in branches if branch._takes(content)), branches[0])

    def _takes(self, content: Any) -> bool:
        origin = get_origin(self.annotation) or self.annotation
        if origin is Any:
            return True
        if isinstance(content, Mapping):
            return self.named is not None or origin is dict or (isinstance(origin, type) and issubclass(origin, Config))
        if isinstance(content, list):
            return origin is list
        return self.named is not None or (isinstance(origin, type) and isinstance(content, origin))

    def config(self, content: Mapping[str, Any]) -> type[Config] | None:
        """The config class that a mapping is checked by; None for an open mapping or an unknown component."""
        subschema = self.branch_for(content)
        if subschema.named is not None:
            return subschema.named.component(content)
        origin = get_origin(subschema.annotation) or subschema.annotation
        return origin if isinstance(origin, type) and issubclass(origin, Config) else None

    def keys(self, content: Mapping[str, Any]) -> list[str]:
        """The keys that a mapping may have here; empty where every key is allowed."""
        named = self.branch_for(content).named
        config = self.config(content)
        own = list(keys_of(config)) if config else []
        return own if named is None or named.key in own else [named.key, *own]

    def field(self, content: Mapping[str, Any], key: str) -> FieldInfo | None:
        """The schema's field behind a key of a mapping."""
        config = self.config(content)
        name = keys_of(config).get(key) if config else None
        return config.model_fields[name] if config and name else None

    def child(self, content: Any, key: str | int) -> Subschema:
        """The subschema of what stands under a key or a list position; of anything at all where the schema has none."""
        if isinstance(content, Mapping):
            field = self.field(content, str(key))
            if field is not None:
                return Subschema.of_field(field)
        branch = self.branch_for(content)
        arguments = get_args(branch.annotation)
        if get_origin(branch.annotation) in (dict, list) and arguments:
            return Subschema(arguments[-1])
        return ANYTHING

    def expand(self, value: Value) -> Value:
        """A component's bare name as the mapping that it stands for; any other value as it is."""
        if not isinstance(value.content, str):
            return value
        named = self.branch_for(value.content).named
        if named is None:
            return value
        name = Value(value.content, value.origin, value.key_origin)
        return Value({named.key: name}, value.origin, value.key_origin, previous=value.previous)

    def name_origin(self, value: Value, key: str) -> Value | None:
        """The name of a component whose mapping does not give it under ``key``, if it follows from its other keys
        or is the schema's default."""
        content = value.plain()
        named = self.branch_for(content).named if isinstance(content, dict) else None
        if named is None or named.key != key:
            return None
        inferred = named.name_in(content)
        return Value(inferred, value.origin) if inferred else Value(named.default, SCHEMA_DEFAULT)


ANYTHING = Subschema(Any)
MANIFEST = Subschema(Manifest)
STAGE = MANIFEST.child({}, "stages").child({}, "")
