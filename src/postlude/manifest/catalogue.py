"""Everything that a manifest can name, for a listing."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass

from postlude.manifest.component import KINDS, lookup, names


@dataclass(frozen=True)
class Entry:
    """One registered component."""

    kind: str
    name: str
    summary: str
    """The first sentence of its documentation."""
    package: str
    """The Python package that brings it."""


def catalogue() -> Iterator[Entry]:
    """Every registered component, by kind and name. BrokenExtension names a package whose component cannot be used."""
    for kind in KINDS:
        for name in names(kind):
            component = lookup(kind, name)
            paragraph = " ".join(inspect.cleandoc(component.__doc__ or "").partition("\n\n")[0].split())
            summary = paragraph.partition(". ")[0].removesuffix(".")
            yield Entry(kind, name, summary, component.__module__.partition(".")[0])
