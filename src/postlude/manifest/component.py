"""Components: what a manifest may name, ours and a user's own alike.

A component is a strict pydantic model that is registered under a kind ("filters") and a name ("dedupe").
Its fields are the keys that the manifest accepts, its methods do the work and import what is heavy inside
themselves, so that a manifest is checked without torch. Three doors lead into the registry, all equal:

- an entry point of an installed package, in the group ``postlude.KIND`` (ours come this way too);
- a module named in the manifest's ``plugins:``, whose import calls :func:`register`;
- :func:`register` itself, used as a decorator, in a program that embeds Postlude.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler
from pydantic_core import PydanticCustomError, core_schema

KINDS = ("recipes", "objectives", "sources", "formats", "filters", "optimizers", "schedules", "sinks")


class Config(BaseModel):
    """A part of the manifest: unknown keys and wrong types are errors, and nothing changes once it is made."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class Component(Config):
    """A part of the manifest that is chosen by name from a registry."""

    component_name: ClassVar[str] = ""
    """The name it is registered under; set by the registry."""


ComponentType = TypeVar("ComponentType", bound=type[Component])

_registered: dict[tuple[str, str], type[Component]] = {}


@cache
def _entry_points(kind: str) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=f"postlude.{kind}")}


def register(kind: str, name: str) -> Callable[[ComponentType], ComponentType]:
    """Register the decorated component as ``name`` among ``kind``. ValueError on an unknown kind or a name taken."""
    if kind not in KINDS:
        raise ValueError(f"There is no kind of component '{kind}'. The kinds are: {', '.join(KINDS)}.")

    def remember(component: ComponentType) -> ComponentType:
        taken = _registered.get((kind, name))
        if taken is not None and taken is not component:
            raise ValueError(f"Two {kind} are registered as '{name}': {taken!r} and {component!r}. Rename one.")
        component.component_name = name
        _registered[kind, name] = component
        return component

    return remember


def names(kind: str) -> list[str]:
    """The names registered under a kind, sorted."""
    return sorted({name for known, name in _registered if known == kind} | set(_entry_points(kind)))


def lookup(kind: str, name: str) -> type[Component]:
    """The component registered as ``name`` among ``kind``. KeyError, with the nearest known name, if there is none."""
    if (kind, name) not in _registered:
        point = _entry_points(kind).get(name)
        if point is None:
            raise KeyError(unknown(kind, name))
        register(kind, name)(point.load())
    return _registered[kind, name]


def unknown(kind: str, name: str) -> str:
    """The sentence that tells a user that ``name`` is not known, and what is."""
    known = names(kind)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return f"'{name}' is not among the {kind}.{hint} Known: {', '.join(known) or 'none'}."


class Named:
    """Annotation of a field that holds a component: ``optimizer: Annotated[Component, Named("optimizers")]``.

    Accepts the bare name, or a mapping with the key ``name`` and the component's own keys. ``key`` is the key
    that tells the name where it is not ``name``; ``infer`` finds the name in a mapping without that key
    (``{path: ...}`` means the source ``path``). What the component's own schema refuses is reported at its place.
    """

    def __init__(
        self, kind: str, key: str = "name", infer: Callable[[dict[str, Any]], str | None] | None = None
    ) -> None:
        self.kind, self.key, self.infer = kind, key, infer

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self._validate,
            serialization=core_schema.plain_serializer_function_ser_schema(self._serialize),
        )

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        choices: list[dict[str, Any]] = [{"enum": names(self.kind)}]
        for name in names(self.kind):
            described = lookup(self.kind, name).model_json_schema(ref_template="#/$defs/{model}")
            described.setdefault("properties", {})[self.key] = {"const": name}
            if self.infer is None:
                described["required"] = sorted({self.key, *described.get("required", [])})
            choices.append(described)
        return {"anyOf": choices}

    def _validate(self, value: Any) -> Component:
        if isinstance(value, Component):
            return value
        keys = {self.key: value} if isinstance(value, str) else value
        if not isinstance(keys, dict):
            raise PydanticCustomError(
                "component",
                "expected a name or a mapping with the key '{key}', found {found}",
                {"key": self.key, "found": repr(value)},
            )
        name = keys.get(self.key) or (self.infer(keys) if self.infer else None)
        if not isinstance(name, str):
            raise PydanticCustomError(
                "component_name",
                "which of the {kind}? Give the key '{key}'. Known: {known}",
                {"kind": self.kind, "key": self.key, "known": ", ".join(names(self.kind))},
            )
        try:
            component = lookup(self.kind, name)
        except KeyError as error:
            raise PydanticCustomError("component_unknown", "{what}", {"what": error.args[0]}) from error
        own = keys if self.key in component.model_fields else {k: v for k, v in keys.items() if k != self.key}
        return component.model_validate(own)

    def _serialize(self, value: Component) -> dict[str, Any]:
        return {self.key: value.component_name, **value.model_dump(mode="json", by_alias=True)}
