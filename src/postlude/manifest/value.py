"""Values that know where they were said, and the file, line and column or the command line behind each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Layer = Literal["manifest", "defaults", "stage", "command line", "schema default"]
KeyPath = tuple[str | int, ...]
"""Keys and list positions from the root of the manifest."""


@dataclass(frozen=True)
class Origin:
    """Where a value comes from."""

    layer: Layer
    file: str = ""
    line: int = 0
    """Counted from 1; 0 where there is no file."""
    column: int = 0
    """Counted from 1."""
    assignment: str = ""
    """The KEY=VALUE of the command line."""

    @property
    def place(self) -> str:
        """``file:line:column``, or the assignment on the command line; of what is given to processes its key alone."""
        if self.assignment:
            return f"command line '{without_value(self.assignment)}'"
        return f"{self.file}:{self.line}:{self.column}"

    def __str__(self) -> str:
        if self.layer == "command line":
            return self.place
        if self.layer == "schema default":
            return self.layer
        return f"{self.layer} at {self.place}"


def without_value(assignment: str) -> str:
    """A KEY=VALUE as it is shown: of variables for processes without the value."""
    key, _, _ = assignment.partition("=")
    gives_variables = key.strip().startswith("compute") and "environment" in assignment
    return f"{key}=..." if gives_variables else assignment


SCHEMA_DEFAULT = Origin("schema default")


@dataclass(frozen=True)
class Setting:
    """A value as somebody set it: one entry in the history of a key."""

    key: str
    value: Any
    origin: Origin


@dataclass(frozen=True)
class Value:
    """A scalar, a list or a mapping of values, with its origin."""

    content: Any
    """dict[str, Value], list[Value], or a scalar of JSON."""
    origin: Origin
    key_origin: Origin | None = None
    """Where the key stands that leads here, if the value is in a mapping."""
    partial: bool = False
    """A mapping that a dotted key on the command line implies: it adds to what is there."""
    previous: tuple[str, Value] | None = None
    """What it took the place of, and the last part of that one's key."""

    @property
    def is_mapping(self) -> bool:
        return isinstance(self.content, dict)

    @property
    def place(self) -> Origin:
        """Where to point for the value as a whole: a block mapping is found by its key."""
        return self.key_origin or self.origin

    def plain(self) -> Any:
        """The value as Python objects that JSON knows."""
        if isinstance(self.content, dict):
            return {key: value.plain() for key, value in self.content.items()}
        if isinstance(self.content, list):
            return [value.plain() for value in self.content]
        return self.content

    def get(self, key: str | int) -> Value | None:
        """What stands under a key or a list position, if anything does."""
        if isinstance(self.content, Mapping):
            return self.content.get(str(key))
        if isinstance(self.content, list) and str(key).isdecimal() and int(key) < len(self.content):
            return self.content[int(key)]
        return None

    def text(self, key: str) -> str | None:
        """The text that stands under a key, if text does."""
        value = self.get(key)
        return value.content if value is not None and isinstance(value.content, str) else None

    def mapping(self, key: str) -> dict[str, Value]:
        """The mapping that stands under a key; empty if there is none."""
        value = self.get(key)
        return value.content if value is not None and isinstance(value.content, dict) else {}

    def at(self, path: KeyPath) -> Value | None:
        """What stands at a path below, if anything does."""
        here: Value | None = self
        for part in path:
            here = here.get(part) if here is not None else None
        return here

    def leaves(self) -> Iterator[Value]:
        """Every scalar and every empty collection below."""
        below = self.content.values() if isinstance(self.content, dict) else self.content
        if not isinstance(self.content, (dict, list)) or not below:
            yield self
            return
        for value in below:
            yield from value.leaves()


def dotted(path: KeyPath) -> str:
    """The path of a key as a user writes it."""
    return ".".join(str(part) for part in path)


def locate(root: Value, path: KeyPath) -> tuple[Origin, str]:
    """Where a user finds a path of the resolved manifest, and the path as the user wrote it.

    What the text does not have is placed where its parent stands; what a stage inherits, in the defaults.
    """
    for length in range(len(path), 0, -1):
        value = root.at(path[:length])
        if value is not None:
            origin = value.place
            if origin.layer == "defaults" and path[0] == "stages":
                return origin, dotted(("defaults", *path[2:]))
            return origin, dotted(path)
    return root.origin, dotted(path)
