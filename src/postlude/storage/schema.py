"""What a line of JSON holds: one model for each kind of line, with its fields, their units and a version.

- A line says its version under the key ``schema``, from the second version on; a line without it is of the first. So
  the version goes wherever the line goes (a revision, another run, a part of a file that is read alone), lines of two
  versions may stand in one file, and what was written before there were versions stays what it was, to the byte.
- A reader knows its own version and all before. Of a newer one it raises :class:`NewerSchema` and changes nothing.
- The version of a kind rises with whatever a reader of the one before would get wrong or refuse: a field that means
  another thing, one that is gone, a kind of event. A metric more is no such thing.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from postlude.storage.errors import StorageError

KEY = "schema"


class NewerSchema(StorageError):
    """It was written by a newer version of postlude than this one."""


class Line(BaseModel):
    """What every line has in common. A unit stands in a field's annotation: ``Annotated[float, "s"]``."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, use_attribute_docstrings=True)

    version: ClassVar[int] = 1

    @classmethod
    def stamp(cls, entry: Mapping[str, Any]) -> dict[str, Any]:
        """The entry as it is written, with its version where it needs one."""
        return {**entry, KEY: cls.version} if cls.version > 1 else dict(entry)

    @classmethod
    def read(cls, entry: dict[str, Any], where: str) -> str | None:
        """Take the version out of an entry. What is wrong with the entry, if something that it must have is.

        NewerSchema, which names ``where`` it stands.
        """
        number = entry.pop(KEY, 1)
        if type(number) is not int:
            return f"its '{KEY}' is {number!r}, which is no version"
        cls.check_version(number, where)
        for name, kinds in _needed(cls).items():
            if not isinstance(entry.get(name), kinds):
                return f"it has no '{name}' as it was written"
        return None

    @classmethod
    def check_version(cls, number: int, where: str) -> None:
        """NewerSchema, which names ``where`` it was met, if this is not a version that can be read."""
        if number > cls.version:
            from importlib.metadata import version  # slow to import, and seldom needed

            raise NewerSchema(
                f"{where} is of version {number} of its schema, and this postlude, {version('postlude')}, knows none "
                f"later than {cls.version}: a newer postlude wrote it, and it was left as it is. Use that postlude, or "
                "a newer one: pip install --upgrade postlude."
            )


@cache
def _needed(schema: type[Line]) -> dict[str, Any]:
    """The fields without a default, with the types that they may have."""
    fields = {name: info.annotation for name, info in schema.model_fields.items() if info.is_required()}
    return {name: (int, float) if kind is float else kind for name, kind in fields.items()}
