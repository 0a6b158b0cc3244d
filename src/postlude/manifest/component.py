"""Components: what a manifest may name, ours and a user's own alike.

A component is a strict pydantic model that is registered under a kind ("filters") and a name ("dedupe").
Its fields are the keys that the manifest accepts, its methods do the work and import what is heavy inside
themselves, so that a manifest is checked without torch. Three doors lead into the registry, all equal:

- an entry point of an installed package, in the group ``postlude.KIND`` (ours come this way too);
- a module named in the manifest's ``plugins:``, whose import calls :func:`register`;
- :func:`register` itself, used as a decorator, in a program that embeds Postlude.
"""

from __future__ import annotations

import importlib
import pkgutil
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError, core_schema

from postlude.manifest.change import EVERY, Change
from postlude.manifest.problem import ManifestError
from postlude.nearest import suggestion_or_list

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
"""Of a stage, a data set or a pool: a part of file names and of dotted keys, so without dots."""
Positive = Annotated[int, Field(gt=0, le=2**53)]
"""A count: no more than what is exact in floating point, too."""
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
"""What random numbers follow from: 64 bits."""
Share = Annotated[float, Field(ge=0, le=1)]

KINDS = (
    "recipes",
    "objectives",
    "preference_losses",
    "sources",
    "formats",
    "filters",
    "optimizers",
    "schedules",
    "sinks",
    "rewards",
    "environments",
    "engines",
    "providers",
    "keys",
)


class Config(BaseModel):
    """A part of the manifest: unknown keys and wrong types are errors, and nothing changes once it is made.

    The string below a field is its documentation, for ``postlude explain`` and for editors.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )

    later: ClassVar[tuple[str, ...]] = ()
    """Keys that a later version brought. With their defaults a stage is what it was before there were such keys, so
    that a run which was begun then goes on. Those of a data set, its format, source and filters are null by default."""
    changes: ClassVar[Mapping[str, Change]] = {}
    """Whether a key may change while a stage runs: for those that are not as what they stand in, and do not have the
    answer of a base class."""
    exactly_one: ClassVar[tuple[tuple[str, ...], ...]] = ()
    """Groups of keys of which one, and only one, is given. One that a stage gives replaces another of the defaults."""

    @classmethod
    def change_of(cls, key: str) -> Change | None:
        """Whether a key may change while a stage runs, where this class or one of its bases says."""
        said = [base.__dict__.get("changes", {}) for base in cls.__mro__]
        return next((changes[each] for each in (key, EVERY) for changes in said if each in changes), None)

    @model_serializer(mode="wrap")
    def _without_later(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A later key that is null is not there: what is made from the text stays the same."""
        return {key: value for key, value in serialize(self).items() if value is not None or key not in self.later}

    @model_validator(mode="after")
    def _has_exactly_one(self) -> Self:
        attributes = keys_of(type(self))
        for group in self.exactly_one:
            keys = [key for key in group if getattr(self, attributes[key]) is not None]
            if len(keys) != 1:
                raise PydanticCustomError(
                    "exactly_one",
                    "exactly one of {group} is needed, found {found}",
                    {"group": _listed(group), "found": _listed(keys) or "none"},
                )
        return self


class Component(Config):
    """A part of the manifest that is chosen by name from a registry."""

    component_name: ClassVar[str] = ""
    """The name it is registered under; set by the registry."""

    @classmethod
    def of(cls, component: object) -> Self:
        """A field's component as one of this class, the base of its kind: ``Schedule.of(config.schedule)``.

        The manifest knows no kind from inside. :class:`BrokenExtension` for a component that does not derive from the
        base of its kind.
        """
        if not isinstance(component, cls):
            its = type(component)
            raise BrokenExtension(
                f"{its.__module__}.{its.__qualname__} cannot be used as a {cls.__qualname__}: derive it from "
                f"{cls.__module__}.{cls.__qualname__}."
            )
        return component


def keys_of(config: type[Config]) -> dict[str, str]:
    """The keys that a part of the manifest accepts, each with its attribute: the same, unless the key is a word of
    Python (``from``)."""
    return {field.alias or name: name for name, field in config.model_fields.items()}


def _listed(keys: Sequence[str]) -> str:
    """'a', 'b' and 'c'."""
    quoted = [repr(key) for key in keys]
    return " and ".join([", ".join(quoted[:-1]), quoted[-1]]) if len(quoted) > 1 else "".join(quoted)


# --- the registry -------------------------------------------------------------------------------------------


class BrokenExtension(ManifestError):
    """A component or plugin that is there but cannot be used. The fault is in the package that brings it."""


ComponentType = TypeVar("ComponentType", bound=type[Component])

_registered: dict[tuple[str, str], type[Component]] = {}


@cache
def _entry_points(kind: str) -> dict[str, tuple[EntryPoint, ...]]:
    return _by_name(entry_points(group=f"postlude.{kind}"))


def _by_name(points: Iterable[EntryPoint]) -> dict[str, tuple[EntryPoint, ...]]:
    """More than one under a name is an error, once the name is used."""
    named: dict[str, tuple[EntryPoint, ...]] = {}
    for point in points:
        same = named.get(point.name, ())
        if all(point.value != other.value for other in same):
            named[point.name] = (*same, point)
    return named


def register(kind: str, name: str) -> Callable[[ComponentType], ComponentType]:
    """Register the decorated component as ``name`` among ``kind``.

    ValueError on an unknown kind, on a name that is taken and on a component that has another name already.
    """
    if kind not in KINDS:
        raise ValueError(f"There is no kind of component '{kind}'. The kinds are: {', '.join(KINDS)}.")

    def remember(component: ComponentType) -> ComponentType:
        value = f"{component.__module__}:{component.__qualname__}"
        others = {point.value for point in _entry_points(kind).get(name, ())} - {value}
        known = _registered.get((kind, name))
        if known is not None and known is not component:
            others.add(f"{known.__module__}:{known.__qualname__}")
        if others:
            raise ValueError(f"Two {kind} have the name '{name}': {value} and {', '.join(others)}. Rename one.")
        earlier = component.__dict__.get("component_name")
        if earlier not in (None, name):
            raise ValueError(f"{value} is registered as '{earlier}' and as '{name}'. Register a subclass of it.")
        component.component_name = name
        _registered[kind, name] = component
        return component

    return remember


def names(kind: str) -> list[str]:
    """The names registered under a kind, sorted."""
    return sorted({name for known, name in _registered if known == kind} | set(_entry_points(kind)))


def lookup(kind: str, name: str) -> type[Component]:
    """The component registered as ``name`` among ``kind``.

    KeyError, with the nearest known name, if there is none; :class:`BrokenExtension` if the package that brings
    it cannot be used.
    """
    if (kind, name) not in _registered:
        points = _entry_points(kind).get(name, ())
        if not points:
            raise KeyError(f"'{name}' is not among the {kind}.{suggestion_or_list(name, names(kind))}")
        if len(points) > 1:
            raise BrokenExtension(
                f"several packages bring {kind} of the name '{name}': {', '.join(map(_described, points))}. "
                "Uninstall all but one."
            )
        _load(kind, points[0])
    return _registered[kind, name]


def _load(kind: str, point: EntryPoint) -> None:
    with _of_others(f"'{point.name}' of the {kind} cannot be loaded from {_described(point)}"):
        component = point.load()
        if not (isinstance(component, type) and issubclass(component, Component)):
            raise TypeError(f"{component!r} is not a class derived from postlude.manifest.component.Component")
        register(kind, point.name)(component)


def _described(point: EntryPoint) -> str:
    package = f"the package '{point.dist.name}'" if point.dist else "an unnamed package"
    return f"{package} (entry point '{point.value}')"


def import_plugin(module: str) -> None:
    """Import a module that registers components. :class:`BrokenExtension` if it cannot be imported."""
    with _of_others(f"the plugin '{module}' cannot be imported; it must be installed, or on PYTHONPATH"):
        importlib.import_module(module)


def load_named(path: str) -> Any:
    """What a component names as ``package.module:name``. :class:`BrokenExtension` if it cannot be imported."""
    with _of_others(f"'{path}' cannot be imported"):
        return pkgutil.resolve_name(path)


@contextmanager
def _of_others(what: str) -> Iterator[None]:
    """Code that is not ours runs here, and may raise anything: tell the user whose fault it is and where."""
    try:
        yield
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        is_ours = "importlib" in frame.filename or frame.filename == __file__
        where = "" if is_ours else f" ({frame.filename}:{frame.lineno})"
        raise BrokenExtension(f"{what}: {type(error).__name__}: {error}{where}") from error


# --- components in fields -----------------------------------------------------------------------------------


def default_name(name: str) -> Any:
    """The default of a field that is :class:`Named`: the component of this name, with the defaults of its keys."""
    return Field(default=name, validate_default=True)


class Named:
    """Annotation of a field that holds a component: ``optimizer: Annotated[Component, Named("optimizers")]``.

    Accepts the bare name, or a mapping with the key ``name`` and the component's own keys. ``key`` is the key
    that tells the name where it is not ``name``; ``infer`` finds the name in a mapping without that key
    (``{path: ...}`` means the source ``path``); ``default`` is the name where nothing says one; ``bare`` writes a
    component that has no keys of its own as its name alone. What the component's own schema refuses is reported at its
    place.
    """

    def __init__(
        self,
        kind: str,
        key: str = "name",
        infer: Callable[[Mapping[str, Any]], str | None] | None = None,
        default: str | None = None,
        bare: bool = False,
    ) -> None:
        self.kind, self.key, self.infer, self.default, self.bare = kind, key, infer, default, bare

    def name_in(self, keys: Mapping[str, Any]) -> str | None:
        """The component's name as a mapping tells it, if it does."""
        name = keys.get(self.key)
        if name is None and self.infer is not None:
            name = self.infer(keys)
        return name if isinstance(name, str) else None

    def component(self, keys: Mapping[str, Any]) -> type[Component] | None:
        """The component that a mapping means; None if that is not known or cannot be used."""
        name = self.name_in(keys) or self.default
        try:
            return lookup(self.kind, name) if name else None
        except (KeyError, BrokenExtension):
            return None

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self._validate,
            serialization=core_schema.plain_serializer_function_ser_schema(self._serialize),
        )

    def __get_pydantic_json_schema__(self, schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        choices: list[dict[str, Any]] = []
        for name in names(self.kind):
            reference = handler(lookup(self.kind, name).__pydantic_core_schema__)
            described = handler.resolve_ref_schema(reference)
            described["properties"] = {self.key: {"const": name}, **described.get("properties", {})}
            if self.infer is None and self.default is None:
                described["required"] = list(dict.fromkeys([self.key, *described.get("required", [])]))
            choices.append(reference)
        return {"anyOf": [{"enum": names(self.kind)}, *choices]}

    def _validate(self, value: Any) -> Component:
        if isinstance(value, Component):
            return value
        keys = {self.key: value} if isinstance(value, str) else value
        if not isinstance(keys, dict):
            raise PydanticCustomError(
                "component_type",
                "must be a name or a mapping with the key '{key}'",
                {"key": self.key},
            )
        name = self.name_in(keys) or (self.default if keys.get(self.key) is None else None)
        if name is None:
            raise PydanticCustomError(
                "component_name",
                "which of the {kind}? Give its name as '{key}'. Known: {known}.",
                {"kind": self.kind, "key": self.key, "known": ", ".join(names(self.kind))},
            )
        try:
            component = lookup(self.kind, name)
        except (KeyError, BrokenExtension) as error:
            raise PydanticCustomError(
                "component_unusable", "{what}", {"what": error.args[0], "key": self.key}
            ) from error
        own = keys if self.key in component.model_fields else {k: v for k, v in keys.items() if k != self.key}
        return component.model_validate(own)

    def _serialize(self, value: Component) -> str | dict[str, Any]:
        if self.bare and not type(value).model_fields:
            return value.component_name
        return {self.key: value.component_name, **value.model_dump(mode="json", by_alias=True)}
